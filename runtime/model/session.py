"""A session: a sequence with its own KV cache, over a shared model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from pastkey.errors import InputError
from pastkey.values import as_path, is_int, or_default, shown

from ..decoding.completion import Completion, completed
from ..decoding.generation import Generation
from ..decoding.kept_tokens import KeptTokens
from ..decoding.stream import Stream
from ..engine.engine import Engine
from ..options import NUM_SINK_TOKENS, ContextOverflow, lists_options, options_of, require_valid
from ..settings import SESSION_OPTIONS, SessionOptions
from .opening import Scheduled, open_stream
from .parts import ModelParts


@lists_options
class Session:
    """A sequence that grows by `append` and `generate`. It begins empty.

    Sessions of one model may be used at the same time, each by one thread at a time. Any thread may call `cancel`. The
    session keeps its KV cache, so only new tokens are computed.
    """

    def __init__(self, parts: ModelParts, ids: Sequence[int] = (), engine: Engine | None = None) -> None:
        """See `LanguageModel.session`. `engine`: its cache holds a prefix of `ids`."""
        self._parts = parts
        self._ids = list(ids)
        self._engine: Engine | None = engine or parts.new_engine()
        self._engine.marks = True
        self._generation: Generation | None = None
        self._cancelled = False

    def __repr__(self) -> str:
        return f"<Session of {len(self.ids)} tokens>" if self._engine is not None else "<Session, closed>"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> list[int]:
        """The tokens so far, including generated ones, without those that a context shift dropped."""
        generation = self._generation
        if generation is None:
            return list(self._ids)
        return generation.kept.of(generation.ids[: generation.prompt_tokens + generation.new_tokens])

    @property
    def text(self) -> str:
        """The text so far, without special tokens; "" without a tokenizer."""
        tokenizer = self._parts.tokenizer
        return "" if tokenizer is None else tokenizer.decode(self.ids)

    @property
    def nbytes(self) -> int:
        """The size of the cache in bytes."""
        return 0 if self._engine is None else self._engine.nbytes

    def append(
        self,
        text: str | Sequence[int],
        *,
        context_overflow: ContextOverflow | None = "error",
        num_sink_tokens: int | None = NUM_SINK_TOKENS,
    ) -> None:
        """Appends a text, and computes its keys and values, except those of the last two tokens.

        Args:
            text: A text, which the tokenizer encodes, with its BOS token if the session is empty; or token ids.
            context_overflow: As in `LanguageModel.generate`: "shift" drops old tokens when the context is full.
            num_sink_tokens: The number of first tokens that stay.

        Raises:
            InputError: The sequence is empty or too long for the context, or the session is closed or generating.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would need more than `max_memory` bytes.

        After an error the session is unchanged.
        """
        require_valid({"context_overflow": context_overflow, "num_sink_tokens": num_sink_tokens})
        engine, before = self._idle(), self._ids
        kept = KeptTokens(engine, or_default(context_overflow, "error"), or_default(num_sink_tokens, NUM_SINK_TOKENS))
        ids = kept.of(kept.checked([*self._ids, *self._encode(text)]))
        self._parts.memory.promise(engine, len(ids))
        scheduler = self._parts.scheduler

        def run() -> None:
            missing = ids[engine.length : -2]
            if missing:
                sizes = engine.chunk_sizes(len(missing))
                engine.append(missing[: sizes[0]])

        try:
            self._ids, self._cancelled = ids, False
            scheduler.exclusively(lambda: engine.keep_prefix(ids))
            while engine.length < len(ids) - 2 and not self._cancelled:
                scheduler.exclusively(run)
        except BaseException:
            self._ids = before
            scheduler.exclusively(lambda: engine.keep_prefix(before))
            raise

    def generate(self, text: str | Sequence[int] = (), **options: Unpack[SessionOptions]) -> Completion:
        """Continues the text.

        Args:
            text: A text to append first, as with `append`.
            **options: Those of `LanguageModel.generate`, except `reuse_prefix`, which a session always does.

        Returns:
            The completion. The session contains it.

        Raises:
            InputError: The sequence is empty or too long, an option is out of range, or the session is closed or
                generating.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
            ResourceError: The cache would need more than `max_memory` bytes.
        """
        return completed(self._stream(text, options_of("session.generate", options, SESSION_OPTIONS)))

    def stream(self, text: str | Sequence[int] = (), **options: Unpack[SessionOptions]) -> Stream:
        """Continues the text token by token. The session contains the yielded tokens. See `generate`.

        The session generates from the first `next` on until the stream ends or is closed.
        """
        return self._stream(text, options_of("session.stream", options, SESSION_OPTIONS))

    def keep(self, prompt: str | Sequence[int]) -> int:
        """Trims the session to its common prefix with a prompt.

        Args:
            prompt: A whole prompt, as in `LanguageModel.generate`.

        Returns:
            The number of tokens that stay. Append or generate the rest of the prompt, `prompt_ids(prompt)[kept:]`.
        """
        self._idle()
        ids, kept = self._parts.prompt_ids(prompt), 0
        for mine, theirs in zip(self._ids, ids, strict=False):
            if mine != theirs:
                break
            kept += 1
        self.trim(kept)
        return kept

    def trim(self, length: int) -> None:
        """Keeps only the first `length` tokens. Raises InputError if there are fewer."""
        engine = self._idle()
        if not is_int(length, 0, len(self._ids)):
            raise InputError(f"the session holds {len(self._ids)} tokens and cannot be trimmed to {shown(length)}")
        del self._ids[length:]
        self._parts.scheduler.exclusively(lambda: engine.cut(length))

    def fork(self) -> Session:
        """Returns another session with the same sequence and a copy of its cache."""
        engine = self._idle()
        if not engine.graph.copies and not engine.manifest.rows:
            return Session(self._parts, self._ids)  # not on the CPU: the fork computes its cache again
        copied: list[Engine] = []
        self._parts.scheduler.exclusively(lambda: copied.append(engine.copy()))
        self._parts.memory.promise(copied[0], engine.length)
        return Session(self._parts, self._ids, copied[0])

    def save(self, path: str | Path) -> None:
        """Writes the sequence and its cache to a file, atomically. `LanguageModel.load_session` reads it.

        Raises:
            InputError: The session is closed or generating.
            OSError: The file cannot be written. The old file stays.
        """
        from .session_file import write_session

        engine, file = self._idle(), as_path(path)
        self._parts.scheduler.exclusively(lambda: write_session(file, self._parts.bundle, self._ids, engine))

    def cancel(self) -> None:
        """Ends the running call within one step, from any thread. The generated tokens stay."""
        self._cancelled = True
        generation = self._generation
        if generation is not None:
            generation.cancel()
            self._parts.scheduler.wake()

    def close(self) -> None:
        """Releases the cache. A running stream ends within one step."""
        generation, engine = self._generation, self._engine
        if generation is not None:
            generation.cancel()
            generation.close()
        self._engine = None
        if engine is not None:
            self._parts.memory.release(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _encode(self, text: str | Sequence[int]) -> list[int]:
        codec = self._parts.tokenizer
        if isinstance(text, str) and self._ids and codec is not None:
            return codec.encode_after(self._ids, text) if text else []
        return self._parts.prompt_ids(text, "text")

    def _stream(self, text: str | Sequence[int], options: Mapping[str, Any]) -> Stream:
        engine = self._idle()
        ids = [*self._ids, *self._encode(text)]
        if not ids:
            raise InputError("the session is empty: append a text first, or generate from one")
        after_text = bool(self._ids) or (isinstance(text, str) and bool(text.strip()))
        lifecycle = _Going(self, engine, exact=options.get("exact", False))
        return open_stream(self._parts, lifecycle, ids, options, after_text=after_text)

    def _idle(self) -> Engine:
        """The engine of an idle session. Raises InputError if the session is closed or generating."""
        self._parts.require_open()
        if self._engine is None:
            raise InputError("this session is closed: open another with model.session()")
        if self._generation is not None and self._generation.closed:
            self._parts.scheduler.exclusively(lambda: None)  # the scheduler removes the closed generation first
        if self._generation is not None:
            raise InputError(
                "this session has an unfinished stream: read it to its end or close it (stream.close()) "
                "first, or continue in a fork"
            )
        return self._engine


class _Going(Scheduled):
    """The lifecycle of a generation that continues a session in its cache."""

    def __init__(self, session: Session, engine: Engine, *, exact: bool) -> None:
        super().__init__(session._parts)
        self._session, self._engine, self._exact = session, engine, exact
        self._before = list(session._ids)

    def starting(self, generation: Generation) -> None:
        """Marks the session as generating. Raises InputError if it has changed since the call."""
        session = self._session
        session._idle()
        if session._ids != self._before:
            raise InputError("the session continued since this stream was made: make another one")
        session._generation = generation

    def provide(self, generation: Generation) -> tuple[Engine, int]:
        """Returns the session's own cache."""
        self.parts.memory.promise(self._engine, generation.most_tokens)
        return self._engine, self._engine.keep_prefix(generation.kept_ids, exact=self._exact)

    def retired(self, generation: Generation) -> None:
        """Adds the generated tokens to the session."""
        session = self._session
        self.parts.scheduler.move_out(self._engine)
        if session._generation is generation:
            failed = generation.error is not None and not generation.new_tokens  # in the prefill
            ids = self._before if failed else list(generation.kept_ids)
            self._engine.cut(len(ids))
            session._ids, session._generation = ids, None
