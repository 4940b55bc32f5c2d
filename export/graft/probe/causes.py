"""Why a module cannot have a KV cache: all causes in one message, the root cause first."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from pastkey.errors import ContractError


class Kind(enum.IntEnum):
    """Kinds of causes. An earlier kind explains the symptoms of a later one."""

    TRAINING = enum.auto()  # eval() has no effect
    CHANCE = enum.auto()
    STATE = enum.auto()
    WRITES = enum.auto()  # a cache written in place
    ROWS = enum.auto()  # sequences of a batch affect one another
    LOOK_AHEAD = enum.auto()
    FIXED = enum.auto()  # only one length works
    RECURRENCE = enum.auto()
    LENGTH = enum.auto()  # numbers computed from T
    DATA = enum.auto()  # branches on values
    UNKNOWN = enum.auto()


# The advice of a message, once per kind: the code to write instead.
_ADVICE = {
    Kind.TRAINING: "eval() calls train(False), so end your train(mode) with  return super().train(mode)",
    Kind.CHANCE: "random numbers belong in training only (give F.dropout training=self.training, and "
    "scaled_dot_product_attention dropout_p=self.dropout if self.training else 0.0; noise goes under if self.training)",
    Kind.STATE: "logits must depend only on the text, so keep nothing on self from one call to the next",
    Kind.WRITES: "the exported graph has its own cache, so compute attention from the keys and values of this "
    "call, as for a whole text from position 0, without the buffers",
    Kind.ROWS: "texts of a batch are independent of one another in a decoder; trained this way, the model cannot be "
    "decoded with a cache",
    Kind.LOOK_AHEAD: "a decoder generates token by token, and later ones do not exist yet; trained this way, the "
    "model cannot be decoded with a cache (one that does not look ahead is a different model)",
    Kind.FIXED: "read the length from the ids, ids.size(1), and use as many rows of a table",
    Kind.RECURRENCE: "a state is kept from token to token where each token computes it from the one before, all in the "
    "same way: by a loop over all tokens in their order, cumsum, nn.GRU, nn.LSTM or nn.RNN",
    Kind.LENGTH: "each added token changes numbers of all earlier tokens, so that none can be kept, and the model "
    "cannot be decoded with a cache",
    Kind.DATA: "no graph can follow Python that looks at values (where a loop leaves out experts without tokens, "
    "compute every expert for every token and multiply by the router's weights, 0 for those that are not chosen)",
}


@dataclass(frozen=True)
class Cause:
    """One reason against a cache."""

    kind: Kind
    what: str  # a predicate: starts with a verb
    where: str = ""  # file:line
    owner: str = field(default="", compare=False)  # class of the submodule


class ObstacleError(Exception):
    """Raised where a cause is found."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.what)
        self.cause = cause


class NoCacheError(ContractError):
    """The module `name` cannot have a cache."""

    def __init__(self, name: str, causes: Iterable[Cause]) -> None:
        self.name = name
        self.causes = tuple(sorted(_true(dict.fromkeys(causes)), key=lambda cause: cause.kind))
        parts = []
        for i, cause in enumerate(self.causes):
            told = f"{cause.where} {cause.what}" if cause.where else f"it {cause.what}"
            last = i + 1 == len(self.causes) or self.causes[i + 1].kind != cause.kind
            parts.append(f"{told}: {_ADVICE[cause.kind]}" if last and cause.kind in _ADVICE else told)
        if len(parts) == 1:
            super().__init__(f"{name} cannot be given a cache: {parts[0]}")
        else:
            listed = ";  ".join(f"({i}) {part}" for i, part in enumerate(parts, 1))
            super().__init__(f"{name} cannot be given a cache, for {len(parts)} reasons:  {listed}")

    def with_(self, seen: Iterable[Cause]) -> NoCacheError:
        """Adds the causes that were seen from outside and are not listed yet."""
        places = {(cause.kind, cause.where) for cause in self.causes}
        kinds = {kind for kind, _ in places}
        return NoCacheError(
            self.name,
            [*self.causes, *(c for c in seen if (c.kind, c.where) not in places and (c.where or c.kind not in kinds))],
        )


def _true(causes: Iterable[Cause]) -> list[Cause]:
    """Drops the unknown causes of submodules that have a known cause, and whatever training mode explains."""
    causes = list(causes)
    if training := [cause for cause in causes if cause.kind == Kind.TRAINING]:
        return training
    known = {cause.owner for cause in causes if cause.kind != Kind.UNKNOWN and cause.owner}
    return [cause for cause in causes if cause.kind != Kind.UNKNOWN or cause.owner not in known]
