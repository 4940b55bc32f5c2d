"""What the process of an untrusted bundle answers, once its limits are in force: the calls of a model, by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..decoding.stream import Stream
from ..model.language_model import LanguageModel
from ..model.scoring import Score
from ..text.chat_format import open_chat_format
from .frames import failure_of, message, read_frame, write_frame
from .protocol import Format, Step

_THREADS, _STACK = 64, 4 << 20  # that wait for tokens, and bytes of each one's stack
_AT_ONCE = ("cancel", "drop")  # what must not wait behind other calls


class Server:
    """Answers each call in a thread of its own, so that one that waits for a token holds up no other."""

    def __init__(self, path: Path, source: BinaryIO, target: BinaryIO) -> None:
        self._path, self._source, self._target = path, source, target
        self._writing = threading.Lock()
        self._loaded: LanguageModel | None = None
        self._open: dict[int, Any] = {}  # streams, chat formats and jobs, by the numbers that the parent gave them
        threading.stack_size(_STACK)
        self._threads = ThreadPoolExecutor(_THREADS)

    def serve(self) -> None:
        """Answers until the questions end; what still runs then has ended with the process."""
        while (asked := read_frame(self._source, json.loads, lambda: sys.maxsize)) is not None:
            if asked["what"] in _AT_ONCE:
                self._answer(asked)
                continue
            try:
                self._threads.submit(self._answer, asked)
            except RuntimeError as error:  # no room for a thread
                self._reply(asked["id"], {"failure": failure_of(error)})
        os._exit(0)

    def _answer(self, asked: Mapping[str, Any]) -> None:
        number = asked["id"]
        try:
            found = getattr(self, f"do_{asked['what']}")(**asked["given"])
            content = {"value": dataclasses.asdict(found) if isinstance(found, Step | Format | Score) else found}
        except BaseException as error:
            content = {"failure": failure_of(error)}
        if number:
            self._reply(number, content)

    def _reply(self, number: int, content: Mapping[str, Any]) -> None:
        try:
            sent = message({"id": number, **content})
        except UnicodeEncodeError:
            sentence = "the text holds half of a surrogate pair, which is not a character"
            sent = message({"id": number, "failure": {"kind": "InputError", "sentence": sentence}})
        except (TypeError, ValueError, RecursionError) as error:
            sent = message({"id": number, "failure": failure_of(error)})
        with self._writing:
            write_frame(self._target, sent)

    @property
    def _model(self) -> LanguageModel:
        assert self._loaded is not None
        return self._loaded

    # --- the model ----------------------------------------------------------------------------------------------------
    def do_load(self, load: str, **settings: Any) -> dict[str, Any]:
        """Opens the bundle on the CPU. Its manifest, as in its file."""
        self._loaded = function_of(load)(self._path, "cpu", **settings)
        return self._model.manifest.to_json()

    def do_defaults(self) -> Mapping[str, Any]:
        """The options that the model's authors name."""
        return self._model.sampling_defaults

    def do_score(self, text: str | list[int]) -> Score:
        """The log-probabilities of a text's tokens."""
        return self._model.score(text)

    def do_drop(self, number: int) -> None:
        """Ends a stream that nobody reads, or lets a chat format go."""
        if isinstance(found := self._open.pop(number, None), Stream):
            found.close()

    # --- streams ------------------------------------------------------------------------------------------------------
    def do_stream(self, number: int, text: str | list[int], options: dict[str, Any]) -> Step:
        """Opens a stream under a number. Its first step."""
        self._open[number] = self._model.stream(text, **read_options(options))
        return self.do_next(number=number)

    def do_next(self, number: int) -> Step:
        """The next step of a stream."""
        found = self._open.get(number)
        if found is None:  # dropped meanwhile
            return Step()
        try:
            return Step(found.prompt_tokens, next(found))
        except StopIteration as end:
            self._open.pop(number, None)
            whole = dataclasses.replace(end.value, text="", ids=[], new_tokens=0, logprobs=[])
            return Step(found.prompt_tokens, whole=whole)

    def do_cancel(self, number: int) -> None:
        """Ends a stream within one step."""
        if (found := self._open.get(number)) is not None:
            found.cancel()

    # --- conversations ------------------------------------------------------------------------------------------------
    def do_format(self, number: int, source: str | None, tools: bool, special_tokens_as_text: bool) -> Format:
        """Compiles a chat template under a number: this one, or the bundle's."""
        model = self._model
        self._open[number] = found = open_chat_format(
            model.bundle, model.tokenizer, source=source, tools=tools, special_tokens_as_text=special_tokens_as_text
        )
        return Format(found.source, tuple(sorted(found.variables)))

    def do_render(self, number: int, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """A conversation as a text."""
        return cast(str, self._open[number].render(messages, **variables))

    def do_chat_ids(self, number: int, messages: list[dict[str, Any]], variables: dict[str, Any]) -> list[int]:
        """A conversation as token ids: rendered and encoded."""
        return cast(list[int], self._open[number].ids(messages, **variables))

    def do_loses_space(self, number: int, token: int) -> bool:
        """Whether a text that begins with this token lacks the space that the token carries."""
        return cast(bool, self._open[number].loses_space(token))

    # --- functions that a command hands over --------------------------------------------------------------------------
    def do_run(self, function: str, arguments: dict[str, Any]) -> Any:
        """What a function of pastkey returns, called with the bundle's path."""
        return function_of(function)(self._path, **arguments)

    def do_begin(self, number: int, function: str, arguments: dict[str, Any]) -> None:
        """Calls one that yields, under a number."""
        self._open[number] = function_of(function)(self._path, **arguments)

    def do_more(self, number: int) -> Any:
        """What it yields next, or None at its end."""
        return next(self._open[number], None)


def function_of(name: str) -> Any:
    """The function that `name_of` named."""
    module, _, inner = name.partition(":")
    return getattr(importlib.import_module(module), inner)


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call as `sent_options` sent them."""
    found = dict(options)
    if isinstance(found.get("logit_bias"), list):
        found["logit_bias"] = dict(found["logit_bias"])
    return found
