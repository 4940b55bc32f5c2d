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


def run_chunks(path: Path, chunks: Sequence[Sequence[int]]) -> Array:
    """Logits (T, V) of one text that is given to the graph in chunks; each takes the cache that the last one left."""
    session = open_graph(path)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = {
        name: np.zeros([1, shape[1], 0, shape[3]], np.float32)
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
        }
        assert set(feeds) | set(past) == set(shapes)
        found = dict(zip(outputs, session.run(outputs, feeds | past), strict=True))
        logits.append(found["logits"][0])
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
        start = end
    return np.concatenate(logits)
