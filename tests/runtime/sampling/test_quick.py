"""The quick way gives the tokens of the stages, and leaves to them what it cannot decide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pastkey.runtime.sampling.quick import Quick, Scores
from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.settings import SamplingConfig

SIZE = 5000  # no multiple of a part
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {3: 2.5, 4: -math.inf}},
    {"temperature": 0.8},
    {"temperature": 0.8, "frequency_penalty": 0.3, "penalty_last_n": 20},
    {"temperature": 0.9, "logit_bias": {5: 20.0, 7: -math.inf}, "repetition_penalty": 0.5},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "presence_penalty": 2.0},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_p": 0.99, "min_p": 0.02},
    {"temperature": 0.7, "top_k": 60, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
]


def logits_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    if kind == "steep":
        return rng.permutation(7.3 - 1.5 * np.log(np.arange(1, SIZE + 1))).astype(np.float32)
    spread = (3 * rng.standard_normal(SIZE)).astype(np.float32)
    return np.round(spread, 1) if kind == "ties" else spread


def slow(config: SamplingConfig) -> Sampler:
    made = Sampler(config)
    made._quick = None
    return made


@pytest.mark.parametrize("one", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["steep", "flat", "ties"])
def test_the_tokens_are_those_of_the_stages(one: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, found = np.random.default_rng(0), list[int | None]()
    draw = Quick.draw

    def counted(self: Quick, scores: Scores, u: float) -> int | None:
        found.append(draw(self, scores, u))
        return found[-1]

    monkeypatch.setattr(Quick, "draw", counted)
    sampler, expected = Sampler(SamplingConfig(seed=3, **one)), slow(SamplingConfig(seed=3, **one))
    logits = logits_of(kind, rng)
    ids = [*rng.integers(0, SIZE, 60).tolist(), *np.argsort(-logits)[:5].tolist()]
    for _ in range(40):
        assert sampler(logits, ids) == expected(logits, ids)
        ids.append(int(rng.integers(0, SIZE)))
    # top_p alone may end at a token whose share is smaller than the error.
    assert not found or found.count(None) <= (40 if kind != "steep" and "top_p" in one else 8)


@pytest.mark.parametrize("one", [{}, {"min_p": 0.5}, {"top_p": 0.99}], ids=str)
def test_a_number_between_two_tokens_is_left_to_the_stages(one: dict[str, Any]) -> None:
    """All tokens are equally likely. top_p keeps the first 1,014."""
    quick, logits = Quick(SamplingConfig(temperature=1.0, seed=0, **one)), np.zeros(1024, np.float32)
    scores = quick.scores(logits, None)
    count = 1014 if "top_p" in one else 1024
    assert quick.draw(scores, 507 / count) is None
    assert quick.draw(scores, 507.5 / count) == 507


@pytest.mark.parametrize(
    "one", [{"temperature": 1e-4}, {"temperature": 1.0, "typical_p": 0.9}, {"no_repeat_ngram_size": 3}], ids=str
)
def test_other_settings_are_not_covered(one: dict[str, Any]) -> None:
    assert Sampler(SamplingConfig(**one))._quick is None


def test_large_logits_are_left_to_the_stages() -> None:
    logits = np.full(600, -3e38, np.float32)
    logits[[5, 500]] = 3e38
    config = SamplingConfig(temperature=1.0, seed=0)
    assert Quick(config).draw(Quick(config).scores(logits, None), 0.3) is None
    assert Sampler(config)(logits, [1]) in (5, 500)
