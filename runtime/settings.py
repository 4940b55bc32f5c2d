"""What a user can set, with the defaults: standard library only, so that `--help` can show them at once."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from pastkey.errors import InputError

MAX_NEW_TOKENS = 64  # of generate, stream and `pastkey run`
CHAT_NEW_TOKENS = 512  # of an answer
BENCH_PROMPT_TOKENS = 512
BENCH_NEW_TOKENS = 128


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen. The defaults choose the most likely one, always."""

    temperature: float = 0.0  # 0 takes the largest logit; 1 draws from the model's own distribution
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens that together have this probability; 1 keeps all
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1, tokens of the prompt and of the text so far become less likely
    seed: int | None = None  # the same seed draws the same tokens; None draws afresh

    def __post_init__(self) -> None:
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self, "a number from 0")
        _require(is_int(self.top_k) and self.top_k >= 0, "top_k", self, "a whole number from 0, which keeps all")
        _require(
            _is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self, "above 0 and at most 1, which keeps all"
        )
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self, "between 0, which keeps all, and 1")
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self,
            "a number above 0; 1 changes nothing",
        )
        _require(self.seed is None or (is_int(self.seed) and self.seed >= 0), "seed", self, "a whole number from 0")


def is_int(value: object) -> bool:
    """Whether it is a whole number, of numpy too."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, config: SamplingConfig, expected: str) -> None:
    if not condition:
        raise InputError(f"{name} is {getattr(config, name)!r}; it must be {expected}")
