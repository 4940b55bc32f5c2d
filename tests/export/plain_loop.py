"""Plain onnxruntime in a separate loop, as another program uses the exported file. Nothing of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pastkey.runtime.providers.ort import onnxruntime  # with telemetry off

Array = npt.NDArray[Any]
HALF = {"tensor(float16)": np.float16}


def open_graph(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def lengths(session: Any, mask: Array, last: int = 1) -> dict[str, Array]:
    """The inputs of a graph in addition to ids, positions and cache, for a mask (B, S).

    Other programs' graph reads the mask; pastkey's own reads lengths, and gives the logits of as many last positions as
    it is told, here one.
    """
    known = {
        "attention_mask": mask,
        "seqlens_k": (mask.sum(1) - 1).astype(np.int32),
        "total_sequence_length": np.array(mask.shape[1], np.int32),
        "evicted": np.zeros(len(mask), np.int32),
        "logits_start": np.array([-last]),
    }
    return {value.name: known[value.name] for value in session.get_inputs() if value.name in known}


@dataclass
class Text:
    """One text that a graph reads in chunks, each with the cache that the last one left: all that a graph asks for."""

    session: Any
    last: int = 1  # positions with logits, of pastkey's own graph
    length: int = 0
    past: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.session.get_inputs():
            if value.name.startswith("past"):
                shape = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
                self.past[value.name] = np.zeros(shape, HALF.get(value.type, np.float32))

    def read(self, ids: Sequence[int]) -> Array:
        """Logits (N, V) of these ids."""
        start, self.length = self.length, self.length + len(ids)
        known = {
            "input_ids": np.array([ids], np.int64),
            "position_ids": np.arange(start, self.length, dtype=np.int64)[None],
        } | self.past
        feeds = {value.name: known[value.name] for value in self.session.get_inputs() if value.name in known}
        feeds |= lengths(self.session, np.ones((1, self.length), np.int64), self.last)
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.past = {
            name: found[name.replace("past_key_values.", "present.").replace("past_conv.", "present_conv.")]
            for name in self.past
        }
        logits: Array = found["logits"][0]
        return logits


def run_chunks(path: Path, chunks: Sequence[Sequence[int]]) -> Array:
    """Logits (T, V) of one text that is given to the graph in chunks; each uses the cache that the last one left."""
    text = Text(open_graph(path))
    return np.concatenate([text.read(chunk) for chunk in chunks])
