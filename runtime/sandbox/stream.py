"""A stream whose tokens another process makes."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np

from pastkey.bundle import Manifest
from pastkey.errors import InputError, PastkeyError, UntrustedBundleError
from pastkey.values import is_collection, is_int, shown

from ..completion import Chunk, Completion
from ..settings import MAX_NEW_TOKENS
from ..stream import Stream, read_already
from .connection import Connection
from .protocol import MOST_JSON, Number, Step, Whole

_TEXT_PER_TOKEN, _TEXT, _MOST_TEXT = 10_000, 1_000_000, 64_000_000  # characters of a token, beside them, and of all
_PER_TOKEN, _MOST = 64, 512_000_000  # bytes of JSON for a token or a log-probability, and of a whole
_LARGEST: Final = 10**1000
_PER_PART: Final = 4  # tokens of a prompt for each of its characters or ids, at most: those of UTF-8's bytes
numbers = itertools.count(1)  # of streams, templates and sessions; one for all processes does no harm


class UntrustedStream(Stream):
    """As Stream: it takes nothing until its first `next`, and may be read, cancelled and closed from any thread.

    One that `waits` waits for the process where it is made, and in `close` for what is said of the whole, unless
    another thread is inside `next`. The other, for event loops, waits in `next` alone: the process is asked to begin
    there, and `close` takes what was told.
    """

    def __init__(
        self,
        connection: Connection,
        holds: object,
        options: Mapping[str, Any],
        manifest: Manifest,
        call: str,
        text: str | list[int],
        *,
        waits: bool = True,
        **given: Any,
    ) -> None:
        """Asks the process to open it, if it waits.

        Args:
            connection: The process.
            holds: What the process lives as long as.
            options: Those of the call, whose names are known.
            manifest: The bundle's.
            call: Which of its calls opens it.
            text: The prompt, as it is sent.
            waits: Whether it waits for the process anywhere but in `next`.
            **given: What the call takes beside number, options and text.
        """
        self._connection, self._holds, self._number = connection, holds, next(numbers)
        self._inside = threading.Lock()
        self._pieces: list[Chunk] = []
        self._tokens = self._length = 0
        self._waits, self._begun = waits, False
        self._over = self._closed = self._cancelled = False
        self._prompt_tokens = 0
        self._whole: Completion | None = None
        self._call, self._vocab_size = call, manifest.vocab_size
        try:
            sent = sent_options(options)
            self._given = {"text": text, **given, "options": sent}
            # An answer has no more than was asked for. What is out of range is refused where the bundle is open.
            new, logprobs = sent.get("max_new_tokens", MAX_NEW_TOKENS), sent.get("logprobs")
            self._most_new = new if is_int(new, 0) else 0
            tokens = self._most_new + (_PER_PART * len(text) if sent.get("prompt_logprobs") else 0)
            each = _PER_TOKEN * (2 + (logprobs if is_int(logprobs, 0, self._vocab_size) else 0))
            self._most = min(MOST_JSON + each * tokens, _MOST)
            self._most_text = min(_TEXT + _TEXT_PER_TOKEN * self._most_new, _MOST_TEXT)
            if waits:
                self._begin()
        except PastkeyError:
            self._over = True
            raise

    def _begin(self) -> None:
        asked = {"stream": self._number, **self._given}
        self._prompt_tokens = self._connection.call("to begin a text", self._call, Number, **asked).number
        self._begun = True

    @property
    def completion(self) -> Completion | None:
        """What it returns at its end; also after `close`, with what was yielded until then. None before."""
        return self._so_far() if self._whole is None and self._closed else self._whole

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self._prompt_tokens

    def __next__(self) -> Chunk:
        return self.send(None)

    def send(self, value: None) -> Chunk:
        """As `next`."""
        del value
        if not self._inside.acquire(blocking=False):
            raise read_already()
        try:
            if self._over:
                raise StopIteration
            return self._step()
        finally:
            self._inside.release()

    def _step(self) -> Chunk:
        if self._cancelled and not self._begun:
            self._finish()
            raise StopIteration(self._whole)
        try:
            if not self._begun:
                self._begin()
                if self._cancelled:  # meanwhile, when there was nothing to be cancelled
                    self.cancel()
            found = self._connection.call("for the next token", "next", Step, stream=self._number, most_json=self._most)
        except BaseException as error:  # an interrupt, too: the answer to this question is lost
            self._finish()
            if isinstance(error, UntrustedBundleError) and self._connection.closed:
                raise StopIteration(self._whole) from None  # as where a model is closed meanwhile
            raise
        if found.piece is None:
            self._over = True
            if found.whole is None:
                self._connection.fail("answered with nothing, and was ended")
            self._whole = self._completion(found.whole)
            raise StopIteration(self._whole)
        chunk = found.piece.chunk()
        self._pieces.append(chunk)
        self._tokens += len(chunk.ids)
        self._length += len(chunk.text)
        # There is a piece for each token, and one for what was held back.
        self._require_asked_for(max(self._tokens, len(self._pieces) - 1), chunk.ids, self._length)
        return chunk

    def _completion(self, whole: Whole) -> Completion:
        self._require_asked_for(len(whole.ids), whole.ids, len(whole.text))
        if whole.new_tokens != len(whole.ids):
            self._connection.fail(f"answered with {len(whole.ids):,} ids of {whole.new_tokens:,} tokens, and was ended")
        return whole.completion()

    def _require_asked_for(self, count: int, ids: Sequence[int], length: int) -> None:
        """Ends the process for more new tokens than were asked for, ids that the model has not, or too long a text."""
        if count > self._most_new:
            self._connection.fail(f"answered with more than {self._most_new:,} new tokens, and was ended")
        if ids and max(ids) >= self._vocab_size:
            self._connection.fail(f"answered with a token of id {max(ids)}, and was ended")
        if length > self._most_text:
            self._connection.fail(f"answered with a text of more than {self._most_text:,} characters, and was ended")

    def cancel(self) -> None:
        """Ends it within one step, from any thread: whoever reads it gets the end, with what was generated so far."""
        self._cancelled = True
        self._connection.tell("cancel", stream=self._number)

    def close(self) -> None:
        """Ends it within one step; no more can be read."""
        self.cancel()
        self._closed = True
        if self._inside.acquire(blocking=False):  # else another thread is inside, and comes to the end now
            try:
                self._finish()
            finally:
                self._inside.release()

    def _finish(self) -> None:
        """Takes the whole of what was told, once."""
        if self._over:
            return
        self._over = True
        if not self._waits:
            self._connection.tell("drop", stream=self._number)
            self._whole = self._so_far()
            return
        whole, call = None, self._connection.call
        with contextlib.suppress(PastkeyError):  # the process has ended
            whole = call("to end a text", "close", Step, stream=self._number, most_json=self._most).whole
            self._whole = None if whole is None else self._completion(whole)
        if self._whole is None:
            self._whole = self._so_far()

    def _so_far(self) -> Completion:
        """What was told, where the process does not say: it has ended, or is at the next token still."""
        chunks = list(self._pieces)
        ids = [token for chunk in chunks for token in chunk.ids]
        logprobs = [found for chunk in chunks for found in chunk.logprobs]
        text = "".join(chunk.text for chunk in chunks)
        return Completion(text, ids, "cancelled", self._prompt_tokens, len(ids), 0.0, 0.0, logprobs=logprobs)

    def __del__(self) -> None:
        if not vars(self).get("_over", True):
            self._connection.tell("drop", stream=self._number)


def sent_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as JSON takes them, a mapping of ids as pairs. Raises InputError where it takes none."""
    found = {}
    for name, value in options.items():
        if name == "logits_processor":
            if not is_collection(value) or len(value):
                raise InputError(
                    "logits_processor is a function, and the process of an untrusted bundle takes none: leave it out, "
                    "or load the bundle with trust=True"
                )
            continue
        sent = value.items() if name == "logit_bias" and isinstance(value, Mapping) else value
        found[name] = sent_value(name, sent)
    return found


def sent_value(name: str, value: Any) -> Any:
    """A value of JSON's types. Raises InputError, which calls it `name`, for what is none."""
    try:
        return _sent(value)
    except (TypeError, RecursionError):
        raise InputError(
            f"{name} is {shown(value)}; text, numbers, lists and mappings go to the process of an untrusted bundle"
        ) from None


def _sent(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
        raise TypeError("no parser of JSON takes it")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _sent(part) for key, part in value.items()}
    if isinstance(value, Collection) and not isinstance(value, bytes | bytearray | memoryview):
        return [_sent(part) for part in value]
    raise TypeError("JSON has no such value")
