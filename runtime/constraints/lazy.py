"""A model's vocabulary for constraints, read at the first constraint."""

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
    """Makes the Matcher of each request. Thread-safe."""

    def __init__(self, codec: TextCodec | None, size: int, eos_ids: Collection[int]) -> None:
        """See `Vocabulary.of`."""
        self._given = codec, size, eos_ids
        self._read: Vocabulary | None = None
        self._reading = threading.Lock()
        _all.add(self)

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
        with self._reading:  # only the first thread reads it
            if self._read is None:
                self._read = Vocabulary.of(codec, size, eos_ids)
        return self._read.matcher(constraint, end_ids)

    @staticmethod
    def after_fork() -> None:
        """Renews the locks in a forked child, where threads that held them do not run."""
        for vocabulary in list(_all):
            vocabulary._reading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=LazyVocabulary.after_fork)
