"""What the process of an untrusted bundle answers, once its limits are in force: the calls of a model, by name."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pastkey.errors import InputError

from ..batching.shared_prefill import SharedPrefill
from ..language_model import LanguageModel
from ..loading import load
from ..opening import open_prompt
from ..session import Session
from ..stream import Stream
from ..text.chat_template import ChatTemplate
from ..text.codec import TextCodec
from ..text.plain_contents import PlainContents
from .failures import failure_of
from .frames import message, read_frame, write_frame
from .protocol import (
    Done,
    Found,
    Ids,
    Loaded,
    Number,
    Piece,
    Ran,
    Scored,
    Shape,
    Step,
    Template,
    Text,
    Values,
    Whole,
    as_json,
)

_THREADS, _STACK = 64, 4 << 20  # that wait for tokens, and bytes of each one's stack
_AT_ONCE = ("cancel", "close", "drop", "session_cancel", "forget")  # what must not wait behind other calls

Array = memoryview | bytes


class Server:
    """Answers each call in a thread of its own, so that one that waits for a token holds up no other."""

    def __init__(self, path: Path, source: BinaryIO, target: BinaryIO) -> None:
        self._path, self._source, self._target = path, source, target
        self._writing = threading.Lock()
        self._loaded: LanguageModel | None = None
        self._streams: dict[int, Stream] = {}
        self._shared: dict[int, tuple[SharedPrefill, int]] = {}
        self._templates: dict[int, ChatTemplate] = {}
        self._sessions: dict[int, Session] = {}
        self._plain: PlainContents | None = None
        threading.stack_size(_STACK)
        self._threads = ThreadPoolExecutor(_THREADS)

    def serve(self) -> None:
        """Answers until there are no more questions; what still runs then has ended with the process."""
        while True:
            found = read_frame(self._source, json.loads, lambda: sys.maxsize, lambda _: sys.maxsize)
            if found is None:
                os._exit(0)
            asked, array = found
            if asked["what"] in _AT_ONCE:
                self._answer(asked, array)
                continue
            try:
                self._threads.submit(self._answer, asked, array)
            except RuntimeError as error:  # no room for a thread
                self._reply(asked["id"], {"failure": failure_of(error)})

    def _answer(self, asked: Mapping[str, Any], array: bytearray) -> None:
        number, given = asked["id"], asked["given"]
        try:
            if array:
                given = {**given, "array": array}
            answer = getattr(self, f"do_{asked['what']}")(**given)
            value, behind = answer if isinstance(answer, tuple) else (answer, b"")
            content, sent = {"value": as_json(value)}, behind
        except BaseException as error:
            content, sent = {"failure": failure_of(error)}, b""
        if number:
            self._reply(number, content, sent)

    def _reply(self, number: int, content: Mapping[str, Any], array: Array = b"") -> None:
        try:
            head = message({"id": number, **content}, array)
        except UnicodeEncodeError:
            sentence = "the text holds half of a surrogate pair, which is no character"
            head, array = message({"id": number, "failure": {"kind": "InputError", "sentence": sentence}}), b""
        except (TypeError, ValueError, RecursionError) as error:
            head, array = message({"id": number, "failure": failure_of(error)}), b""
        with self._writing:
            write_frame(self._target, head, array)

    @property
    def _model(self) -> LanguageModel:
        assert self._loaded is not None
        return self._loaded

    @property
    def _codec(self) -> TextCodec:
        if self._model.tokenizer is None:
            raise InputError("this bundle has no tokenizer: give the prompt as token ids (--prompt-ids 1,2,3)")
        return self._model.tokenizer

    # --- the model ----------------------------------------------------------------------------------------------------
    def do_load(self, **settings: Any) -> Loaded:
        """Opens the bundle on the processor."""
        self._loaded = load(self._path, "cpu", **settings)
        return Loaded(self._loaded.manifest.to_json(), self._loaded.tokenizer is not None)

    def do_defaults(self) -> Values:
        """The options that the model's authors name."""
        return Values(dict(self._model.sampling_defaults))

    def do_logits(self, ids: list[int]) -> tuple[Shape, Array]:
        """The logits of every position."""
        found = np.ascontiguousarray(self._model.logits(ids), "<f4")
        return Shape(*found.shape), found.data.cast("B")

    def do_embed(self, text: Any, pooling: Any, normalize: Any) -> tuple[Shape, Array]:
        """Embeddings: one, or a row for each text or token."""
        found = np.atleast_2d(self._model.embed(text, pooling=pooling, normalize=normalize)).astype("<f4")
        return Shape(*found.shape), found.data.cast("B")

    def do_score(self, text: str | list[int]) -> Scored:
        """The log-probabilities of a text's tokens."""
        return Scored(**dataclasses.asdict(self._model.score(text)))

    # --- the tokenizer ------------------------------------------------------------------------------------------------
    def do_encode(self, text: str, add_special_tokens: bool) -> Ids:
        """The ids of a text."""
        return Ids(tuple(self._codec.encode(text, add_special_tokens=add_special_tokens)))

    def do_decode(self, ids: list[int], keep_special_tokens: bool) -> Text:
        """The text of ids."""
        return Text(self._codec.decode(ids, keep_special_tokens=keep_special_tokens))

    def do_loses_space(self, token: int) -> Found:
        """Whether a text that begins with this token lacks the space that the token carries."""
        return Found(self._codec.loses_space(token))

    # --- streams ------------------------------------------------------------------------------------------------------
    def do_stream(
        self, stream: int, text: str | list[int], options: dict[str, Any], shared: list[int] | None = None
    ) -> Number:
        """Opens a stream under a number. `shared`: the number of a prefill, and how many streams share it."""
        prefill = None
        if shared is not None:
            key, count = shared
            prefill, left = self._shared.pop(key) if key in self._shared else (SharedPrefill(count), count)
            if left > 1:
                self._shared[key] = prefill, left - 1
        found = open_prompt(self._model.parts, text, read_options(options), prefill)  # type: ignore[arg-type]
        self._streams[stream] = found
        return Number(found.prompt_tokens)

    def do_next(self, stream: int) -> Step:
        """The next piece of a stream, or its whole at the end."""
        try:
            return Step(piece=Piece.of(next(self._streams[stream])))
        except StopIteration as end:
            self._streams.pop(stream, None)
            return Step(whole=Whole.of(end.value))

    def do_cancel(self, stream: int) -> Done:
        """Ends a stream within one step."""
        if (found := self._streams.get(stream)) is not None:
            found.cancel()
        return Done()

    def do_close(self, stream: int) -> Step:
        """Ends a stream that nobody reads; the whole with what was told until then."""
        found = self._streams.pop(stream, None)
        if found is None:
            return Step()
        found.close()
        return Step(whole=None if found.completion is None else Whole.of(found.completion))

    def do_drop(self, stream: int) -> Done:
        """Ends a stream that was collected."""
        if (found := self._streams.pop(stream, None)) is not None:
            found.close()
        return Done()

    # --- conversations ------------------------------------------------------------------------------------------------
    def do_template(self, template: int, source: str | None, tools: bool) -> Template:
        """Compiles a chat template under a number: this one, or the bundle's."""
        found = ChatTemplate.from_bundle(self._model.bundle, tools=tools, source=source)
        self._templates[template] = found
        return Template(found.source, tuple(sorted(found.variables)))

    def do_forget(self, template: int) -> Done:
        """Lets a template go."""
        self._templates.pop(template, None)
        return Done()

    def do_render(self, template: int, messages: list[dict[str, Any]], given: dict[str, Any]) -> Text:
        """A conversation as a text."""
        return Text(self._templates[template].render(messages, **given))

    def do_plain(self) -> Done:
        """Prepares contents as ordinary characters."""
        self._plain = self._plain or PlainContents(self._codec)
        return Done()

    def do_protect(self, value: Any, but: list[str]) -> Values:
        """A value that `plain_encode` reads as ordinary characters."""
        assert self._plain is not None
        return Values({"value": self._plain.protect(value, but)})

    def do_plain_encode(self, rendered: str) -> Ids:
        """The ids of a rendering of protected values."""
        assert self._plain is not None
        return Ids(tuple(self._plain.encode(rendered)))

    # --- sessions -----------------------------------------------------------------------------------------------------
    def do_session(self, session: int, fork_of: int | None = None) -> Done:
        """Begins a session under a number, or a copy of another one."""
        self._sessions[session] = self._model.session() if fork_of is None else self._sessions[fork_of].fork()
        return Done()

    def do_session_append(self, session: int, text: str | list[int], options: dict[str, Any]) -> Done:
        """Appends to its text."""
        self._sessions[session].append(text, **options)
        return Done()

    def do_session_stream(self, stream: int, session: int, text: str | list[int], options: dict[str, Any]) -> Number:
        """Opens a stream of a session."""
        self._streams[stream] = found = self._sessions[session].stream(text, **read_options(options))
        return Number(found.prompt_tokens)

    def do_session_ids(self, session: int) -> Ids:
        """Its tokens."""
        return Ids(tuple(self._sessions[session].ids))

    def do_session_bytes(self, session: int) -> Number:
        """Bytes of its cache."""
        return Number(self._sessions[session].nbytes)

    def do_session_trim(self, session: int, length: int) -> Done:
        """Forgets all but so many tokens."""
        self._sessions[session].trim(length)
        return Done()

    def do_session_cancel(self, session: int) -> Done:
        """Ends what it does."""
        if (found := self._sessions.get(session)) is not None:
            found.cancel()
        return Done()

    def do_session_close(self, session: int) -> Done:
        """Lets go of its cache."""
        if (found := self._sessions.pop(session, None)) is not None:
            found.close()
        return Done()

    # --- commands -----------------------------------------------------------------------------------------------------
    def do_command(self, name: str, arguments: dict[str, Any]) -> Ran:
        """Runs a command on the bundle, and gives what it prints."""
        from .. import cli

        command = getattr(cli, f"{name}_command")
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = command.run(argparse.Namespace(**{**arguments, "bundle": str(self._path)}))
        return Ran(status, out.getvalue(), error.getvalue())


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as `sent_options` sent them."""
    found = dict(options)
    if isinstance(found.get("logit_bias"), list):
        found["logit_bias"] = dict(found["logit_bias"])
    return found
