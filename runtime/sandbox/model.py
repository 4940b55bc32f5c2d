"""A model whose bundle is open only in a child process with limits."""

from __future__ import annotations

import asyncio
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeVar, Unpack, cast, overload

from pastkey.contract.bundle import parse_manifest
from pastkey.errors import InputError, LimitWarning, PastkeyError
from pastkey.files.folder import require_manifest

from ..decoding.asynchronous import AsyncStream
from ..decoding.completion import Completion, completed
from ..decoding.many import several, token_ids
from ..model.chat.calls import ChatCalls
from ..model.chat.chat import Chat
from ..model.chat.chat_stream import ChatStream
from ..model.chat.prompt import ChatPrompt
from ..model.generation_config import NAMES
from ..model.scoring import Score
from ..model.unpack import TemporaryFolder, given_as, tell_as_given
from ..options import options_of, require_known, require_valid
from ..settings import GENERATE_OPTIONS, ChatOptions, GenerateOptions
from ..text.chat_template import read_template
from .chat_format import SandboxedChatFormat
from .connection import Connection, name_of
from .limits import Limits
from .protocol import MOST_JSON
from .stream import PER_TOKEN, SandboxedStream

if TYPE_CHECKING:
    from ..text.tools import Tool

T = TypeVar("T")
_HAS: Final = (
    "generate, agenerate, stream, astream, chat, generate_chat, stream_chat, agenerate_chat, astream_chat, score, "
    "ascore, sampling_defaults, manifest, limits and close"
)


class SandboxedModel(ChatCalls):
    """A bundle that a child process opens with limits: `pastkey.load(path, trust=False)`.

    The child runs on the CPU, and the parent validates every reply. A late reply, or any end of the child, raises
    UntrustedBundleError, and so does every later call: load the bundle again. Any number of threads and tasks may call
    at the same time; they are decoded together.

    Attributes:
        path: The bundle's folder.
        manifest: The bundle's manifest, as the child read it.
        limits: The child's limits.
        closed: Whether `close` was called.
        connection: The connection to the child.
    """

    def __init__(self, opened: Opened, settings: Mapping[str, Any]) -> None:
        """See `open_sandboxed`."""
        self.connection = connection = opened.connection
        self.limits = connection.in_force
        self.path, self._max_batch, self.closed = opened.path, settings["max_batch"], False
        # Before the bundle is opened: whatever happens then, the process ends.
        self._finalizer = weakref.finalize(self, opened.close)
        try:
            found = connection.call("to load", "load", dict[str, Any], settings)
            try:
                self.manifest = parse_manifest(opened.path, found)
            except PastkeyError as error:
                connection.fail(f"answered with no manifest ({error}), and was ended")
        except BaseException as error:
            self._finalizer()
            if opened.temporary is not None:
                tell_as_given(error, opened.path, opened.name)
            raise

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"<SandboxedModel {self.path} ({self.manifest.precision}{closed})>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"a sandboxed model has no {name!r}; it has {_HAS}: load a bundle that you trust with trust=True"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child. Running generations end; later calls raise."""
        self.closed = True
        self._finalizer()

    @property
    def sampling_defaults(self) -> ChatOptions:
        """See LanguageModel."""
        connection = self._alive()
        found = connection.call("for the sampling defaults", "defaults", dict[str, Any], {})
        try:
            require_known("the process", found, NAMES)
            require_valid(found)
        except PastkeyError as error:
            connection.fail(f"answered with no sampling defaults ({error}), and was ended")
        return cast(ChatOptions, found)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of them, too
        self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[GenerateOptions]
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        **options: Unpack[GenerateOptions],
    ) -> Completion | list[Completion]:
        """Continues a prompt, or each of several, which are decoded together.

        Args:
            prompt: A text, or a sequence of token ids (T,); or a sequence of these.
            **options: As in `LanguageModel.generate`, without `logits_processor`.

        Returns:
            The continuation; of several prompts a list of them, in the same order.

        Raises:
            UntrustedBundleError: The child broke a limit, crashed, or sent no valid reply.
            InputError: As in `LanguageModel.generate`.
            OptionError: There is no option of that name.
        """
        given = options_of("generate", options, GENERATE_OPTIONS)
        if not several(prompt):
            return completed(self._stream(prompt, given))  # type: ignore[arg-type]
        streams = [self._stream(one, given) for one in prompt]  # type: ignore[arg-type]
        threads = ThreadPoolExecutor(self._max_batch)
        try:
            return list(threads.map(completed, streams))
        finally:
            for stream in streams:
                stream.close()
            threads.shutdown(wait=False)

    async def agenerate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion:
        """As `generate` of one prompt, for `await`. Cancelling the task ends it within one step."""
        return await self._astream(prompt, options_of("agenerate", options, GENERATE_OPTIONS)).completed()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> SandboxedStream:
        """Continues one prompt token by token.

        The first `next` raises errors of the prompt and of the values of options.

        Args:
            prompt: A text, or a sequence of token ids (T,).
            **options: As in `generate`.

        Returns:
            An iterator with a Chunk for each new token. `completion` has the Completion at the end; it is also the
            value of StopIteration.

        Raises:
            OptionError: There is no option of that name.
        """
        return self._stream(prompt, options_of("stream", options, GENERATE_OPTIONS))

    def astream(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AsyncStream:
        """As `stream`, for `async for`. Cancelling the task ends it within one step."""
        return self._astream(prompt, options_of("astream", options, GENERATE_OPTIONS))

    def answer(self, prompt: ChatPrompt, options: Mapping[str, Any]) -> ChatStream:
        """See ChatModel."""
        return prompt.answered(self._stream(prompt.ids, {**prompt.defaults, **options}))

    def chat(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        template: str | Path | None = None,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        special_tokens_as_text: bool | None = False,
        **template_variables: Any,
    ) -> Chat:
        """Begins a conversation. See `LanguageModel.chat`; the child renders and encodes it."""
        return Chat(
            self,
            system,
            messages=messages,
            template=template,
            tools=tools,
            documents=documents,
            special_tokens_as_text=special_tokens_as_text,
            template_variables=template_variables,
        )

    def chat_format(
        self, template: str | Path | None = None, *, tools: bool = False, special_tokens_as_text: bool = False
    ) -> SandboxedChatFormat:
        """How a conversation becomes token ids. `LanguageModel.chat` has the arguments and the errors."""
        source = None if template is None else read_template(template)
        return SandboxedChatFormat(self._alive(), source, tools=tools, special_tokens_as_text=special_tokens_as_text)

    def score(self, text: str | Sequence[int]) -> Score:
        """The log-probability of each token of a text, and their sum. See `LanguageModel.score`."""
        sent = self._sent(text, "text")
        most = MOST_JSON + PER_TOKEN * len(sent)
        return self._alive().call("for a score", "score", Score, {"text": sent}, most=most)

    async def ascore(self, text: str | Sequence[int]) -> Score:
        """As `score`, for `await`."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, self.score, text)

    @property
    def executor(self) -> Executor:
        """The threads that wait for the tokens of an event loop."""
        return _Waiters()

    def _alive(self) -> Connection:
        """The process. Raises InputError where the model is closed, UntrustedBundleError where it has ended."""
        if self.closed:
            raise InputError("this model is closed: load it again with pastkey.load()")
        self.connection.require_alive()
        return self.connection

    def _sent(self, prompt: str | Sequence[int], name: str = "prompt") -> str | list[int]:
        """A prompt as JSON has it. Raises InputError for what is neither a text nor token ids."""
        if isinstance(prompt, str):
            return prompt
        return token_ids(prompt, self.manifest.vocab_size, name)

    def _stream(self, prompt: str | Sequence[int], options: Mapping[str, Any]) -> SandboxedStream:
        return SandboxedStream(self._alive(), self, self._sent(prompt), options, self.manifest)

    def _astream(self, prompt: str | Sequence[int], options: Mapping[str, Any]) -> AsyncStream:
        return AsyncStream(self._stream(prompt, options), self.executor)


class _Waiters(Executor):
    """A thread for each call, for which the end of the program does not wait: the process may keep it waiting."""

    def submit(self, function: Callable[..., T], /, *args: Any, **given: Any) -> Future[T]:
        """See Executor."""
        future: Future[T] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    found = function(*args, **given)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(found)

        threading.Thread(target=work, name="pastkey", daemon=True).start()
        return future


@dataclass(frozen=True)
class Opened:
    """A process for a bundle, and the temporary folder that the bundle lies in, if any."""

    path: Path
    name: str  # what messages call it
    connection: Connection
    temporary: TemporaryFolder | None

    def close(self) -> None:
        """Ends the process, and removes the folder."""
        self.connection.close()
        if self.temporary is not None:
            self.temporary.remove()


def connect(given: object, limits: Limits, readable: Sequence[str] = ()) -> Opened:
    """Starts a process for a bundle. No file of it is read here: a resource that is not a file is copied.

    Args:
        given: As `load` takes it. The process unpacks a zip file to a temporary folder.
        limits: What it may take.
        readable: Further files that it may read.
    """
    found = given_as(given)
    if found.path.suffix == ".gguf":  # told by the name: no file is read here
        require_manifest(found.path, "bundle")
    path, temporary, unpack_to = found.path.absolute(), found.temporary, None
    if path.is_file():
        temporary = temporary or TemporaryFolder()
        unpack_to = temporary.path / "unpacked"
        unpack_to.mkdir()
    connection = Connection(path, limits, name=found.name, unpack_to=unpack_to, readable=readable)
    if unpack_to is not None and found.temporary is not None:
        path.unlink()
    return Opened(unpack_to or path, found.name, connection, temporary)


def open_sandboxed(
    load: Callable[..., object], given: object, limits: Limits | None, settings: Mapping[str, Any]
) -> SandboxedModel:
    """Opens a bundle in a process of its own. A LimitWarning says which limits this system lacks.

    Args:
        load: `pastkey.load`, which the process calls by its name.
        given: As `load` takes it.
        limits: What it may take.
        settings: Those of `load`, checked, without a provider.

    Raises:
        UntrustedBundleError: The process breaks a limit, crashes or gives no answer.
        PastkeyError: As `load` does.
    """
    key = settings.get("key")
    opened = connect(given, limits or Limits(), [] if key is None else [key])
    model = SandboxedModel(opened, {**settings, "load": name_of(load)})
    if model.limits.missing:
        warnings.warn(f"{opened.path}: {model.limits}", LimitWarning, stacklevel=3)
    return model
