"""What a process says: no object is made of it but these, each field by its type and range.

A hostile bundle may have taken the process over, so that it may say anything. The first reply that is none of these, or
longer than was asked for, ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal

from pastkey.typed import Between, Natural, TokenId

from ..completion import Chunk, Completion
from ..sampling.log_probs import TokenLogprob
from ..scoring import Score

MOST_JSON: Final = 16_000_000  # bytes of a reply, where nothing else is said

Seconds = Annotated[float, Between(0, 1e12)]
LogProbability = Annotated[float, Between(-1e39, 1)]  # a difference of float32, and an error of rounding above 0
Reason = Literal["stop", "length", "stop_string", "cancelled", "deadline"]


@dataclass(frozen=True)
class Failure:
    """An error: the name of a class of pastkey.errors, or "memory" or "fault"."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Logprob:
    """A TokenLogprob."""

    id: TokenId
    logprob: LogProbability
    ids: tuple[TokenId, ...]
    logprobs: tuple[LogProbability, ...]

    @classmethod
    def of(cls, found: TokenLogprob) -> Logprob:
        return cls(found.id, found.logprob, tuple(i for i, _ in found.top), tuple(p for _, p in found.top))

    def logprob_of(self) -> TokenLogprob:
        return TokenLogprob(self.id, self.logprob, list(zip(self.ids, self.logprobs, strict=False)))


@dataclass(frozen=True)
class Piece:
    """A Chunk."""

    text: str
    ids: tuple[TokenId, ...]
    logprobs: tuple[Logprob, ...] = ()

    @classmethod
    def of(cls, chunk: Chunk) -> Piece:
        return cls(chunk.text, tuple(chunk.ids), tuple(map(Logprob.of, chunk.logprobs)))

    def chunk(self) -> Chunk:
        return Chunk(self.text, list(self.ids), [found.logprob_of() for found in self.logprobs])


@dataclass(frozen=True)
class Whole:
    """A Completion, without the tool calls, which a Chat reads."""

    text: str
    ids: tuple[TokenId, ...]
    finish_reason: Reason
    prompt_tokens: Natural
    new_tokens: Natural
    prefill_seconds: Seconds
    decode_seconds: Seconds
    cached_tokens: Natural
    stop_string: str | None
    draft_tokens: Natural
    accepted_tokens: Natural
    forced_tokens: Natural
    dropped_tokens: Natural
    logprobs: tuple[Logprob, ...]
    prompt_logprobs: tuple[Logprob | None, ...]

    @classmethod
    def of(cls, found: Completion) -> Whole:
        values = {name: getattr(found, name) for name in cls.__dataclass_fields__}
        values["logprobs"] = tuple(map(Logprob.of, found.logprobs))
        values["prompt_logprobs"] = tuple(p if p is None else Logprob.of(p) for p in found.prompt_logprobs)
        return cls(**values)

    def completion(self) -> Completion:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["ids"] = list(self.ids)
        values["logprobs"] = [found.logprob_of() for found in self.logprobs]
        values["prompt_logprobs"] = [found if found is None else found.logprob_of() for found in self.prompt_logprobs]
        return Completion(**values)


@dataclass(frozen=True)
class Step:
    """What a stream gives: its next piece, or the whole at its end."""

    piece: Piece | None = None
    whole: Whole | None = None


@dataclass(frozen=True)
class Loaded:
    """What a model says of itself: its manifest as in its file, and whether there is a tokenizer."""

    manifest: Mapping[str, Any]
    tokenizer: bool


@dataclass(frozen=True)
class Done:
    """Nothing but that it was done."""


@dataclass(frozen=True)
class Ids:
    """Token ids."""

    ids: tuple[TokenId, ...]


@dataclass(frozen=True)
class Text:
    """A text."""

    text: str


@dataclass(frozen=True)
class Found:
    """Whether something is so."""

    found: bool


@dataclass(frozen=True)
class Number:
    """How many."""

    number: Natural


@dataclass(frozen=True)
class Values:
    """Named values of JSON, which their reader checks."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Template:
    """A chat template: its source, and the variables that it reads."""

    source: str
    variables: tuple[str, ...]


@dataclass(frozen=True)
class Scored:
    """A Score."""

    ids: tuple[TokenId, ...]
    logprobs: tuple[LogProbability | None, ...]
    total: float

    def score(self) -> Score:
        return Score(list(self.ids), list(self.logprobs), self.total)


@dataclass(frozen=True)
class Shape:
    """The sizes of the array behind the JSON."""

    rows: Natural
    columns: Natural


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit status."""

    status: Annotated[int, Between(0, 255)]
    out: str
    error: str


@dataclass(frozen=True)
class Reply:
    """One reply: what was found, or a failure."""

    id: Natural
    value: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None


def as_json(value: Any) -> dict[str, Any]:
    """The fields of one of the classes above."""
    return asdict(value)
