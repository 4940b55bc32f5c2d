"""Plain onnxruntime in a loop of its own: what another program does with the exported file. Nothing of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.runtime.providers.ort import onnxruntime  # with telemetry off

Array = npt.NDArray[Any]


def open_graph(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_batch(path: Path, ids: Array, mask: Array, new: Array) -> tuple[Array, Array]:
    """Logits of a padded prompt (B, T), and of further tokens `new` (B, N) that are appended one column at a time.

    `mask` (B, T) is 1 for a real token. What is appended stands after the padding, which no token sees.
    """
    session = open_graph(path)
    past = {
        value.name: np.zeros([len(ids), value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    outputs = [value.name for value in session.get_outputs()]
    logits: list[Array] = []
    for column in [ids, *(new[:, i : i + 1] for i in range(new.shape[1]))]:
        if logits:
            mask = np.concatenate([mask, np.ones_like(column)], axis=1)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -column.shape[1] :]
        feeds = {"input_ids": column, "position_ids": positions} | lengths(session, mask)
        found = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        logits.append(found["logits"])
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
    return logits[0], np.concatenate(logits[1:], axis=1)


def lengths(session: Any, mask: Array) -> dict[str, Array]:
    """What a graph takes beside ids, positions and cache, for a mask (B, S).

    Other programs' graph reads the mask; pastkey's own takes lengths, and gives the logits of as many last positions as
    it is told, here one.
    """
    known = {
        "attention_mask": mask,
        "seqlens_k": (mask.sum(1) - 1).astype(np.int32),
        "total_sequence_length": np.array(mask.shape[1], np.int32),
        "logits_start": np.array([-1]),
    }
    return {value.name: known[value.name] for value in session.get_inputs() if value.name in known}


def run_chunks(path: Path, chunks: Sequence[Sequence[int]]) -> Array:
    """Logits (T, V) of one text that is given to the graph in chunks; each takes the cache that the last one left."""
    session = open_graph(path)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    half = any(value.type == "tensor(float16)" for value in session.get_inputs())
    past = {
        name: np.zeros([1, shape[1], 0, shape[3]], np.float16 if half else np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }
    outputs = [value.name for value in session.get_outputs()]
    start, logits = 0, []
    for chunk in chunks:
        end = start + len(chunk)
        feeds = {
            "input_ids": np.array([chunk], np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
        } | lengths(session, np.ones((1, end), np.int64))
        assert set(feeds) | set(past) == set(shapes)
        found = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        logits.append(found["logits"][0])
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
        start = end
    return np.concatenate(logits)
