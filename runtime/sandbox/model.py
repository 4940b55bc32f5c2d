"""A language model whose bundle is open in another process, with limits, and nowhere else."""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt

from pastkey.bundle import Bundle, parse_manifest
from pastkey.errors import InputError, LimitWarning, PastkeyError
from pastkey.values import is_one_of, shown

from ..batching.shared_prefill import SharedPrefill
from ..generation_config import NAMES
from ..language_model import LanguageModel
from ..many import several, token_ids
from ..scoring import Score
from ..settings import ChatOptions, GenerateOptions, Pooling, SamplingConfig, require_known
from ..unpacking import given_as, remove
from .connection import Connection
from .conversation import Tokenizer, UntrustedChat
from .limits import Limits
from .protocol import MOST_JSON, Loaded, Scored, Shape, Values
from .session import UntrustedSession
from .stream import UntrustedStream, numbers, sent_value

if TYPE_CHECKING:
    from ..asynchronous import AsyncStream
    from ..engine.engine import Engine
    from ..text.codec import TextCodec

T = TypeVar("T")
_PER_TOKEN = 64  # bytes of JSON for an id and its log-probability


class UntrustedModel(LanguageModel):
    """As LanguageModel, over a bundle that another process has opened under limits.

    What the process says is checked like a stranger's file. It runs on the processor. A call that it does not answer in
    time, and whatever else ends it, raises UntrustedBundleError, as every later call does: load the bundle again.

    Attributes:
        bundle: The bundle's path, and its manifest.
        manifest: What the bundle says of itself.
        tokenizer: Encodes and decodes, or None for a bundle that has none.
        max_batch: How many generations are decoded in one run, at most.
        limits: The limits that the process has.
        connection: The way to the process.
    """

    def __init__(
        self,
        path: Path,
        connection: Connection,
        settings: Mapping[str, Any],
        folder: Path | None,
        given: tuple[Any, Any],
    ) -> None:
        """See `open_untrusted`. `folder` is a temporary one; `given` is what was to be loaded, and its limits."""
        self.connection = connection
        self._again, self._folder = (*given, dict(settings)), folder
        # Before the bundle is opened: whatever happens then, the process ends.
        self._finalizer = weakref.finalize(self, _let_go, connection, folder, os.getpid())
        try:
            found = connection.call("to load", "load", Loaded, **settings)
            try:
                self.manifest = parse_manifest(path, found.manifest)
            except PastkeyError as error:
                connection.fail(f"answered with no manifest ({error}), and was ended")
        except BaseException:
            self._finalizer()
            raise
        self.bundle = Bundle(path, self.manifest)
        # Both have what a Chat and an application call.
        self.tokenizer = cast("TextCodec | None", Tokenizer(connection) if found.tokenizer else None)
        self.limits = connection.in_force
        self.max_batch: int = settings["max_batch"]
        self._is_closed = False
        self._prefills: weakref.WeakKeyDictionary[SharedPrefill, int] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        closed = ", closed" if self._is_closed else ""
        return f"<UntrustedModel {self.bundle.path} ({self.manifest.precision}{closed})>"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an UntrustedModel has no {name!r}: what it would tell is in another process")

    @property
    def sampling_defaults(self) -> ChatOptions:
        """See LanguageModel."""
        found = self.alive().call("for the sampling defaults", "defaults", Values).values
        try:
            require_known("the process", found, NAMES)
            SamplingConfig.of(found)
        except PastkeyError as error:
            self.connection.fail(f"answered with no sampling defaults ({error}), and was ended")
        return cast(ChatOptions, dict(found))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Ends the process. Generations that run end; later calls raise."""
        self._is_closed = True
        self._finalizer()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads the bundle again, by its path, in a process of its own."""
        if self._folder is not None:
            raise InputError("a model that was unpacked cannot be given to another process: load it there")
        return open_untrusted, self._again

    def alive(self) -> Connection:
        """The process. Raises InputError where the model is closed, UntrustedBundleError where it has ended."""
        if self._is_closed:
            raise InputError("this model is closed: load it again with pastkey.load()")
        self.connection.require_alive()
        return self.connection

    def require_open(self) -> Engine:
        """Raises: no engine is here."""
        self.alive()
        raise InputError("the engine of an untrusted bundle is in another process: load it with trust=True to have it")

    @property
    def executor(self) -> Executor:
        """The threads that wait for the tokens of an event loop."""
        self.alive()
        return _Waiters()

    def session(self) -> UntrustedSession:
        """See LanguageModel. It cannot be saved."""
        return UntrustedSession(self)

    def load_session(self, path: str | Path) -> NoReturn:
        """Raises InputError: the process of an untrusted bundle reads no file but the bundle's."""
        raise InputError(
            f"{shown(path)} cannot be loaded: the process of an untrusted bundle reads no session; append its ids to a "
            "new one"
        )

    def logits(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """See LanguageModel."""
        size = self.manifest.vocab_size
        tokens = token_ids(ids, "ids", "a sequence of token ids", size)
        return self._array("logits", "logits", len(tokens), size, ids=tokens)

    def embed(
        self,
        text: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> npt.NDArray[np.float32]:
        """See LanguageModel."""
        many, each = several(text), is_one_of(pooling, ("none",))
        sent = [*map(self._sent, text)] if many else self._sent(text)  # type: ignore[arg-type]
        size, context = self.manifest.hidden_size or 0, self.manifest.context_length
        most = len(sent) if many else context if each else 1
        options = {"pooling": sent_value("pooling", pooling), "normalize": sent_value("normalize", normalize)}
        found = self._array("embeddings", "embed", most, size, fewer=each, text=sent, **options)
        return found if many or each else found[0]

    def _array(
        self, called: str, what: str, rows: int, columns: int, *, fewer: bool = False, **given: Any
    ) -> npt.NDArray[np.float32]:
        """An answer (rows, columns), with `fewer` of so many rows at most. One of another shape ends the process."""
        connection = self.alive()
        shape, content = connection.call_with_array(
            f"for {called}", what, Shape, most_array=4 * rows * columns, **given
        )
        expected = shape.rows == rows or (fewer and 0 < shape.rows <= rows)
        if not expected or shape.columns != columns or len(content) != 4 * shape.rows * columns:
            connection.fail(f"answered with {called} of shape ({shape.rows}, {shape.columns}), and was ended")
        return np.frombuffer(content, "<f4").reshape(shape.rows, columns).astype(np.float32, copy=False)

    def score(self, text: str | Sequence[int]) -> Score:
        """See LanguageModel."""
        sent = self._sent(text)
        most = MOST_JSON + _PER_TOKEN * len(sent)
        return self.alive().call("for a score", "score", Scored, text=sent, most_json=most).score()

    def chat(self, system: str | None = None, **given: Any) -> UntrustedChat:
        """See LanguageModel."""
        own = ("template", "tools", "documents", "special_tokens_as_text")
        variables = {name: value for name, value in given.items() if name not in own}
        options = {name: value for name, value in given.items() if name in own}
        return UntrustedChat(self, system, template_variables=variables, **options)

    def _sent(self, prompt: str | Sequence[int]) -> str | list[int]:
        """A prompt as it is sent: ids are looked at here."""
        return prompt if isinstance(prompt, str) else self.prompt_ids(prompt)

    def _stream(
        self,
        prompt: str | Sequence[int],
        options: GenerateOptions,
        shared: SharedPrefill | None = None,
        *,
        waits: bool = True,
    ) -> UntrustedStream:
        prefill = None if shared is None else [self._prefills.setdefault(shared, next(numbers)), shared.count]
        return UntrustedStream(
            self.alive(),
            self,
            options,
            self.manifest,
            "stream",
            self._sent(prompt),
            waits=waits,
            shared=prefill,
        )

    def _astream(self, prompt: str | Sequence[int], options: GenerateOptions) -> AsyncStream:
        """What the process says of the prompt and the options comes with the first token: no loop waits for it."""
        from ..asynchronous import AsyncStream

        return AsyncStream(self._stream(prompt, options, waits=False), self.executor)


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


def open_untrusted(given: object, limits: Limits | None, settings: Mapping[str, Any]) -> UntrustedModel:
    """Opens a bundle in a process of its own. A LimitWarning says which limits this system lacks.

    Args:
        given: As `load` takes it. No file of it is read here: a resource that is no file is copied.
        limits: What it may take.
        settings: Those of `load`, checked, without a provider.

    Raises:
        UntrustedBundleError: The process breaks a limit, crashes or gives no answer.
        PastkeyError: As `load` does.
    """
    found = given_as(given)
    path = found.path if found.content is not None else found.path.absolute()
    unpack_to = Path(tempfile.mkdtemp(prefix="pastkey-")) if found.content is not None or path.is_file() else None
    folder = unpack_to or found.copied
    try:
        readable = [settings["key"]] if settings.get("key") is not None else []
        connection = Connection(path, limits or Limits(), found.content, unpack_to=unpack_to, readable=readable)
    except BaseException:
        if folder is not None:
            remove(folder, os.getpid())
        raise
    model = UntrustedModel(unpack_to or path, connection, settings, folder, (given, limits))
    if connection.in_force.missing:
        warnings.warn(f"{path}: {connection.in_force}", LimitWarning, stacklevel=3)
    return model


def _let_go(connection: Connection, folder: Path | None, made_by: int) -> None:
    connection.close()
    if folder is not None:
        remove(folder, made_by)
