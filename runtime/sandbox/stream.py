"""A stream whose tokens the child process makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any, Final

from pastkey.contract.bundle import Manifest
from pastkey.errors import InputError, UntrustedBundleError
from pastkey.values import is_collection

from ..decoding.completion import Chunk, Completion
from ..decoding.stream import ChunkStream
from ..options import MAX_NEW_TOKENS
from ..text.environment import plain
from .connection import Connection, numbers
from .protocol import MOST_JSON, Step

PER_TOKEN: Final = 64  # bytes of JSON for an id and its log-probability
_TEXT_PER_TOKEN, _TEXT = 10_000, 1_000_000  # characters of a token, and beside them
_PER_PART: Final = 4  # tokens of a prompt for each of its characters or ids, at most: those of UTF-8's bytes


class SandboxedStream(ChunkStream):
    """As Stream: it may be read, cancelled and closed from any thread.

    The first `next` starts the generation, and raises errors of the prompt and the options. Only `next` waits for the
    child.
    """

    def __init__(
        self,
        connection: Connection,
        holds: object,
        text: str | Sequence[int],
        options: Mapping[str, Any],
        manifest: Manifest,
    ) -> None:
        """Asks for nothing yet.

        Args:
            connection: The process.
            holds: What the process lives as long as.
            text: The prompt.
            options: Those of the call, whose names are known.
            manifest: The bundle's.

        Raises InputError for a function, and TypeError for an option that JSON does not hold.
        """
        super().__init__()
        self._connection, self._holds, self._number = connection, holds, next(numbers)
        self._chunks: list[Chunk] = []
        self._prompt_tokens = self._tokens = self._length = 0
        self._begun = self._over = self._cancelled = False
        sent = sent_options(options)
        self._given: dict[str, Any] = {"text": text, "options": sent}
        # An answer has no more than was asked for. What the vocabulary lacks is refused where the bundle is open.
        new, logprobs = sent.get("max_new_tokens", MAX_NEW_TOKENS), sent.get("logprobs", 0)
        self._vocab_size, self._most_new = manifest.vocab_size, new
        self._most_text = _TEXT + _TEXT_PER_TOKEN * self._most_new
        each = PER_TOKEN * (2 + min(logprobs, self._vocab_size))
        self._most = MOST_JSON + (_PER_PART * len(text) * each if sent.get("prompt_logprobs") else 0)

    def _next(self) -> Chunk:
        if self._cancelled and not self._begun:
            self.close()
        if self._over:
            raise StopIteration(self.completion)
        return self._taken(self._asked())

    def _asked(self) -> Step:
        what, given = ("next", {}) if self._begun else ("stream", self._given)
        self._begun = True
        try:
            asked = {"number": self._number, **given}
            found = self._connection.call("for the next token", what, Step, asked, most=self._most)
        except BaseException as error:  # an interrupt, too: the answer to this question is lost
            self.close()
            if isinstance(error, UntrustedBundleError) and self._connection.closed:
                raise StopIteration(self.completion) from None  # as where a model is closed meanwhile
            raise
        if what == "stream" and (self._over or self._cancelled):  # meanwhile, when the process may not have begun
            self._connection.tell("drop" if self._over else "cancel", number=self._number)
        return found

    def _taken(self, found: Step) -> Chunk:
        self._prompt_tokens = found.prompt_tokens
        if self._over:  # closed meanwhile
            raise StopIteration(self.completion)
        if found.whole is not None:
            self._over, self.completion = True, self._completion(found.whole)
            raise StopIteration(self.completion)
        if found.piece is None:
            self._connection.fail("answered with nothing, and was ended")
        chunk = found.piece
        self._chunks.append(chunk)
        self._tokens += len(chunk.ids)
        self._length += len(chunk.text)
        # There is a piece for each token, and one for what was held back.
        if max(self._tokens, len(self._chunks) - 1) > self._most_new:
            self._connection.fail(f"answered with more than {self._most_new:,} new tokens, and was ended")
        for token in chunk.ids:
            if not 0 <= token < self._vocab_size:
                self._connection.fail(f"answered with a token of id {token}, and was ended")
        if self._length > self._most_text:
            self._connection.fail(f"answered with a text of more than {self._most_text:,} characters, and was ended")
        return chunk

    def _completion(self, whole: Completion) -> Completion:
        """With what the chunks told."""
        chunks = list(self._chunks)
        ids = [token for chunk in chunks for token in chunk.ids]
        logprobs = [found for chunk in chunks for found in chunk.logprobs]
        text, prompt, new = "".join(chunk.text for chunk in chunks), self._prompt_tokens, len(ids)
        return dataclasses.replace(whole, text=text, ids=ids, logprobs=logprobs, prompt_tokens=prompt, new_tokens=new)

    def cancel(self) -> None:
        """Ends it within one step, from any thread: whoever reads it gets the end, with what was generated so far."""
        self._cancelled = True
        self._connection.tell("cancel", number=self._number)

    def close(self) -> None:
        """Ends it within one step; no more can be read. Never waits."""
        if self._over:
            return
        self._over = True
        self.completion = self._completion(Completion("", [], "cancelled", 0, 0, 0.0, 0.0))
        self._connection.tell("drop", number=self._number)

    def __del__(self) -> None:
        if not vars(self).get("_over", True):
            self._connection.tell("drop", number=self._number)


def sent_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as JSON takes them, a mapping of ids as pairs. Raises InputError for a function."""
    found = {}
    for name, value in options.items():
        if name == "logits_processor":
            if not is_collection(value) or len(value):
                raise InputError(
                    "logits_processor is a function, and the process of an untrusted bundle takes none: leave it out, "
                    "or load the bundle with trust=True"
                )
            continue
        pairs = name == "logit_bias" and isinstance(value, Mapping)
        found[name] = plain(list(value.items()) if pairs else list(value) if isinstance(value, Set) else value)
    return found
