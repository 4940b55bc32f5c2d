"""A model's vocabulary for constraints, read when the first of them asks for it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from pastkey.errors import InputError

from ..text.codec import TextCodec
from .constraint import Constraint
from .matcher import Matcher
from .vocabulary import Vocabulary

_all: weakref.WeakSet[LazyVocabulary] = weakref.WeakSet()


class LazyVocabulary:
    """Gives each new text what follows it."""

    def __init__(self, codec: TextCodec | None, size: int, eos_ids: Collection[int]) -> None:
        """See `Vocabulary.of`."""
        self._given = codec, size, eos_ids
        self._read: Vocabulary | None = None
        self._reading = threading.Lock()
        _all.add(self)

    def matcher(self, options: Mapping[str, Any], end_ids: Collection[int] | None = None) -> Matcher | None:
        """That of a call's options, or None where they hold a text to nothing. `end_ids`: see `Vocabulary.matcher`.

        Raises:
            InputError: The constraint is wrong or cannot be met, or the bundle's tokenizer is none for constraints.
            MissingExtraError: llguidance is not installed.
        """
        constraint = Constraint.of(options)
        if constraint is None:
            return None
        codec, size, eos_ids = self._given
        if codec is None:
            raise InputError(f"this bundle has no tokenizer, so that no text can be held to {constraint.kind}")
        with self._reading:  # once, whoever asks for it meanwhile
            if self._read is None:
                self._read = Vocabulary.of(codec, size, eos_ids)
        return self._read.matcher(constraint, end_ids)

    @staticmethod
    def after_fork() -> None:
        """In a child, where no thread that was reading goes on."""
        for vocabulary in list(_all):
            vocabulary._reading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LazyVocabulary.after_fork)
