"""Plain onnxruntime in a loop of its own: what another program does with the exported file. Nothing of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.runtime.ort import onnxruntime  # with telemetry off

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
        feeds = {"input_ids": column, "attention_mask": mask, "position_ids": positions} | _keeping_one(session)
        found = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        logits.append(found["logits"])
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
    return logits[0], np.concatenate(logits[1:], axis=1)


def _keeping_one(session: Any) -> dict[str, Array]:
    """What pastkey's own graph is told beside that: to give the logits of one position."""
    return {v.name: np.array([-1]) for v in session.get_inputs() if v.name == "logits_start"}


def _told(session: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    """pastkey's own fused graph is told lengths in place of a mask of ones."""
    mask = feeds["attention_mask"]
    lengths = {"seqlens_k": np.array([mask.shape[1] - 1], np.int32), "total_sequence_length": np.int32(mask.shape[1])}
    known = feeds | {name: np.asarray(length) for name, length in lengths.items()}
    return {v.name: known[v.name] for v in session.get_inputs() if v.name in known}


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
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
        } | _keeping_one(session)
        feeds = _told(session, feeds)
        assert set(feeds) | set(past) == set(shapes)
        found = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        logits.append(found["logits"][0])
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
        start = end
    return np.concatenate(logits)
