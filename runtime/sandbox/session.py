"""A session whose text and cache another process has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from pastkey.errors import InputError
from pastkey.values import is_int, shown

from ..completion import Completion, completed
from ..session import Session
from ..settings import NUM_SINK_TOKENS, SESSION_OPTIONS, ContextOverflow, SessionOptions, require_known
from ..stream import Stream
from .protocol import Done, Ids, Number
from .stream import UntrustedStream, numbers, sent_options

if TYPE_CHECKING:
    from .model import UntrustedModel


class UntrustedSession(Session):
    """As Session, but that it cannot be saved: its process writes no file."""

    def __init__(self, model: UntrustedModel, fork_of: int | None = None) -> None:
        """See `LanguageModel.session`. `fork_of`: the number of a session to copy."""
        self._untrusted, self._number, self._closed = model, next(numbers), False
        self._call("to begin a session", "session", fork_of=fork_of)

    def _call(self, doing: str, what: str, **given: Any) -> None:
        self._untrusted.alive().call(doing, what, Done, session=self._number, **given)

    def __repr__(self) -> str:
        return "<UntrustedSession, closed>" if self._closed else f"<UntrustedSession of {len(self.ids)} tokens>"

    @property
    def ids(self) -> list[int]:
        """The tokens of the text so far, the generated ones included."""
        self._require_open()
        return list(self._untrusted.alive().call("for a session's ids", "session_ids", Ids, session=self._number).ids)

    @property
    def text(self) -> str:
        """The text so far, special tokens left out; "" without a tokenizer."""
        tokenizer = self._untrusted.tokenizer
        return "" if tokenizer is None else tokenizer.decode(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes."""
        if self._closed:
            return 0
        return (
            self._untrusted.alive().call("for a session's size", "session_bytes", Number, session=self._number).number
        )

    def append(
        self,
        text: str | Sequence[int],
        *,
        context_overflow: ContextOverflow = "error",
        num_sink_tokens: int = NUM_SINK_TOKENS,
    ) -> None:
        """See `Session.append`."""
        self._require_open()
        sent = sent_options({"context_overflow": context_overflow, "num_sink_tokens": num_sink_tokens})
        self._call("to append to a session", "session_append", text=self._sent(text), options=sent)

    def generate(self, text: str | Sequence[int] = (), **options: Unpack[SessionOptions]) -> Completion:
        """See `Session.generate`."""
        require_known("session.generate", options, SESSION_OPTIONS)
        return completed(self._stream(text, options))

    def stream(self, text: str | Sequence[int] = (), **options: Unpack[SessionOptions]) -> Stream:
        """See `Session.stream`."""
        require_known("session.stream", options, SESSION_OPTIONS)
        return self._stream(text, options)

    def keep(self, prompt: str | Sequence[int]) -> int:
        """See `Session.keep`."""
        mine, theirs, kept = self.ids, self._untrusted.prompt_ids(prompt), 0
        while kept < min(len(mine), len(theirs)) and mine[kept] == theirs[kept]:
            kept += 1
        self.trim(kept)
        return kept

    def trim(self, length: int) -> None:
        """See `Session.trim`."""
        self._require_open()
        if not is_int(length):
            raise InputError(f"length is {shown(length)}; a whole number was expected")
        self._call("to trim a session", "session_trim", length=int(length))

    def fork(self) -> UntrustedSession:
        """See `Session.fork`."""
        self._require_open()
        return UntrustedSession(self._untrusted, self._number)

    def save(self, path: str | Path) -> NoReturn:
        """Raises InputError: the process of an untrusted bundle writes no file."""
        raise InputError(
            f"the session cannot be saved in {shown(path)}: the process of an untrusted bundle writes no file; keep "
            "its ids"
        )

    def cancel(self) -> None:
        """See `Session.cancel`."""
        self._untrusted.connection.tell("session_cancel", session=self._number)

    def close(self) -> None:
        """See `Session.close`."""
        if not vars(self).get("_closed", True):
            self._closed = True
            self._untrusted.connection.tell("session_close", session=self._number)

    def __del__(self) -> None:
        self.close()

    def _sent(self, text: str | Sequence[int]) -> str | list[int]:
        return text if isinstance(text, str) else self._untrusted.prompt_ids(text)

    def _require_open(self) -> None:
        if self._closed:
            raise InputError("this session is closed: open another with model.session()")

    def _stream(self, text: str | Sequence[int], options: SessionOptions) -> Stream:
        self._require_open()
        model = self._untrusted
        return UntrustedStream(
            model.alive(), (model, self), options, model.manifest, "session_stream", self._sent(text),
            session=self._number,
        )  # fmt: skip
