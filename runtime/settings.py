"""What a user can set, with the defaults: standard library only, so that `--help` can show them at once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from pastkey.errors import OptionError
from pastkey.values import is_int, is_number, require

# An execution provider by a short name ("cuda") or onnxruntime's, alone or with its options.
Choice = str | tuple[str, dict[str, Any]]

MAX_NEW_TOKENS = 64  # of generate, stream and `pastkey run`
CHAT_NEW_TOKENS = 512  # of an answer
_LEAST, _MOST = 2.0**-149, 2.0**127  # settings count as float32, in which others are 0 or infinity
MAX_DRAFT_TOKENS = 3  # of a step, beside the token that is certain
BENCH_PROMPT_TOKENS = 512
BENCH_NEW_TOKENS = 128


class ChatOptions(TypedDict, total=False):
    """The options of `Chat.ask` and `Chat.stream`; the defaults are SamplingConfig's and those named above."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    prompt_lookup: bool
    timeout: float | None
    keep_special_tokens: bool


class GenerateOptions(ChatOptions, total=False):
    """The options of `LanguageModel.generate` and `LanguageModel.stream`."""

    reuse_prefix: bool
    exact: bool


class PlacementOptions(TypedDict, total=False):
    """Where a bundle runs, as `load` takes it."""

    providers: Choice | Sequence[Choice] | None
    threads: int | None
    allow_fallback: bool
    session_entries: Mapping[str, str] | None


class SessionOptions(ChatOptions, total=False):
    """The options of `Session.generate` and `Session.stream`."""

    exact: bool


CHAT_OPTIONS: frozenset[str] = ChatOptions.__optional_keys__
GENERATE_OPTIONS: frozenset[str] = GenerateOptions.__optional_keys__
SESSION_OPTIONS: frozenset[str] = SessionOptions.__optional_keys__


def require_known(call: str, options: Collection[str], known: Collection[str]) -> None:
    """Raises OptionError for the first of `options` that `call` does not know."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise OptionError(
                f"{call}() has no option {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; its options are {', '.join(sorted(known))}")
            )


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen. The defaults choose the most likely one, always."""

    temperature: float = 0.0  # 0 takes the largest logit; 1 draws from the model's own distribution
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens that together have this probability; 1 keeps all
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1, tokens of the prompt and of the text so far become less likely
    seed: int | None = None  # 0 to 2**63 - 1; the same seed draws the same text; None draws afresh

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingConfig:
        """That of a call's options; those about something else are passed over."""
        return cls(**{field.name: options[field.name] for field in dataclasses.fields(cls) if field.name in options})

    def __post_init__(self) -> None:
        require(
            is_number(self.temperature) and 0 <= self.temperature <= _MOST,
            "temperature",
            self.temperature,
            "a number from 0 to 2**127",
        )
        require(is_int(self.top_k, 0), "top_k", self.top_k, "a whole number from 0, which keeps all")
        require(
            is_number(self.top_p) and _LEAST <= self.top_p <= 1,
            "top_p",
            self.top_p,
            "above 0 and at most 1, which keeps all",
        )
        require(
            is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "between 0, which keeps all, and 1"
        )
        require(
            is_number(self.repetition_penalty) and _LEAST <= self.repetition_penalty <= _MOST,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0 and at most 2**127; 1 changes nothing",
        )
        require(
            self.seed is None or is_int(self.seed, 0, 2**63 - 1),
            "seed",
            self.seed,
            "a whole number from 0 to 2**63 - 1",
        )
