"""A model's vocabulary for constraints, read at the first constraint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pastkey.errors import InputError

from ..text.codec import TextCodec
from .constraint import Constraint
from .matcher import Matcher

if TYPE_CHECKING:
    from .vocabulary import Vocabulary


class LazyVocabulary:
    """Makes the Matcher of each request. Threads that are first at the same time may each read the vocabulary."""

    def __init__(self, codec: TextCodec | None, size: int, eos_ids: Collection[int]) -> None:
        """See `Vocabulary.of`."""
        self._given = codec, size, eos_ids
        self._read: Vocabulary | None = None

    def matcher(self, options: Mapping[str, Any], end_ids: Collection[int] | None = None) -> Matcher | None:
        """The matcher for a call's options, or None without a constraint. `end_ids`: see `Vocabulary.matcher`.

        Raises:
            InputError: The constraint is wrong or cannot be met, or the tokenizer does not support constraints.
            MissingExtraError: llguidance is not installed.
        """
        constraint = Constraint.of(options)
        if constraint is None:
            return None
        codec, size, eos_ids = self._given
        if codec is None:
            raise InputError(f"this bundle has no tokenizer, so that no text can be held to {constraint.kind}")
        from .vocabulary import Vocabulary

        try:
            if self._read is None:
                self._read = Vocabulary.of(codec, size, eos_ids)
            return self._read.matcher(constraint, end_ids)
        except InputError as error:
            error.option = constraint.kind
            raise
