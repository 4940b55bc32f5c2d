"""Sampling vectors: logits, settings, the text so far and a random number, with the token that they give.

`vectors.json` is read by the tests of each sampler: numpy, the kernel library, the generation graph, the page and the
examples for phones. Its tokens are those of `defined_token`: the text of docs/output.md over the whole vocabulary, in
float64, which shares no code with any sampler. `test_sampler.py` holds each row, and one that is written anew, to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FILE = Path(__file__).with_name("vectors.json")
SIZE = 5003  # no multiple of a part of the kernels, and parts enough for top_k
GENERATE = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}  # all that graphs, page and phones have
REAL = ("temperature", "top_p", "min_p", "repetition_penalty")  # they count as float32


@dataclass(frozen=True)
class Vector:
    """A row. `u` is the number in [0, 1) of the token after `ids` by the seed."""

    name: str
    given: str | list[float]  # a kind of `made_logits`, or the logits themselves
    settings: dict[str, Any]
    ids: list[int]
    seed: int
    u: float
    expected: int

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        return made_logits(self.given) if isinstance(self.given, str) else np.array(self.given, np.float32)

    @property
    def options(self) -> dict[str, Any]:
        """The settings as fields of a SamplingConfig."""
        bias = {int(token): value for token, value in self.settings.get("logit_bias", {}).items()}
        return {**self.settings, "seed": self.seed, **({"logit_bias": bias} if bias else {})}

    @property
    def generates(self) -> bool:
        """Whether graphs, page and phones have all of its settings."""
        return self.settings.keys() <= GENERATE


def made_logits(kind: str) -> npt.NDArray[np.float32]:
    """Logits (SIZE,) by a seed: as words are distributed, normal, with equal ones, or with nine of ten banned."""
    rng = np.random.default_rng(0)
    spread = 3 * rng.standard_normal(SIZE)
    logits = {
        "steep": lambda: rng.permutation(7.3 - 1.5 * np.log(np.arange(1, SIZE + 1))),
        "spread": lambda: spread,
        "rounded": lambda: np.round(spread),
        "masked": lambda: np.where(rng.random(SIZE) < 0.9, -np.inf, spread),
    }[kind]()
    return logits.astype(np.float32)


def sampling_vectors() -> list[Vector]:
    return [Vector(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))]


def defined_token(logits: npt.NDArray[Any], ids: Sequence[int], u: float, **settings: Any) -> tuple[int, float]:
    """The token that `u` draws, and how far `u` is from drawing another one (infinite without a draw)."""
    x = logits.astype(np.float64)
    c = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **settings}
    c |= {name: float(np.float32(c[name])) for name in REAL}
    for token, bias in c.get("logit_bias", {}).items():
        x[int(token)] += bias
    last = c.get("penalty_last_n", -1)
    counted = list(ids) if last < 0 else list(ids)[len(ids) - min(last, len(ids)) :]
    for token in set(counted):
        x[token] = x[token] / c["repetition_penalty"] if x[token] > 0 else x[token] * c["repetition_penalty"]
        x[token] -= c.get("presence_penalty", 0.0) + counted.count(token) * c.get("frequency_penalty", 0.0)
    if not c["temperature"]:
        return int(np.argmax(x)), np.inf
    x = (x - x.max()) / c["temperature"]
    if 0 < c["top_k"] < x.size:
        x[x < np.sort(x)[-c["top_k"]]] = -np.inf
    if c["top_p"] < 1:
        probabilities = np.exp(x) / np.exp(x).sum()
        order = np.argsort(-probabilities, kind="stable")
        before = np.append(0.0, np.cumsum(probabilities[order])[:-1])
        x[order[before >= c["top_p"]]] = -np.inf
    if c["min_p"]:
        x[x < np.log(c["min_p"])] = -np.inf
    sums = np.cumsum(np.exp(x) / np.exp(x).sum())
    token = int(np.flatnonzero(sums / sums[-1] > u)[0])
    return token, float(np.abs(sums / sums[-1] - u).min())
