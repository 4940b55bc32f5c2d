"""The loaded model behind the routes: opens a job, lets it wait for its place, and reads it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pastkey.contract.names import GENERATION_CONFIG
from pastkey.runtime import AsyncStreamMany, ChatPrompt, Chunk, Completion, LanguageModel, TextPrompt

from .errors import RequestError
from .events import DONE, PING, EventStream, Writer, ahead
from .metrics import ServerMetrics
from .settings import ServerSettings

T = TypeVar("T")
_MOST_TEXTS = 1024  # of one request, which holds one place


@dataclass(frozen=True)
class GenerationJob:
    """The request to the model: `n` continuations of each prompt, with the runtime's options."""

    prompts: Sequence[ChatPrompt] | Sequence[TextPrompt]
    n: int
    options: dict[str, Any]


class Running:
    """A job that was accepted: its chunks, and at the end its completions.

    Attributes:
        name: The name of the model or adapter that answers.
        job: The job.
        created: The time of its acceptance, in seconds since 1970.
    """

    def __init__(self, service: Service, name: str, job: GenerationJob, stream: AsyncStreamMany) -> None:
        self.name, self.job, self.created = name, job, int(time.time())
        self._service, self._stream = service, stream

    async def read(self, take: Callable[[tuple[int, Chunk]], object]) -> None:
        """Gives `take` pairs of a place and a chunk, once it is this job's turn. A cancellation ends it in one step."""
        began, first = time.perf_counter(), True

        def timed(pair: tuple[int, Chunk]) -> None:
            nonlocal first
            if first:
                self._service.metrics.first_token.observe(time.perf_counter() - began)
                first = False
            take(pair)

        async with self._stream, self._service.places:
            await self._stream.read(timed)
        self._service.metrics.seconds.observe(time.perf_counter() - began)

    @property
    def completions(self) -> list[Completion]:
        """The completions, by place, at the end."""
        return [completion for completion in self._stream.completions if completion is not None]

    async def answered(self, request: Request, writer: Writer, *, stream: bool) -> Response:
        """The response: events, or one reply at the end. A client that goes away ends the job."""
        if stream:
            return EventStream(self._events(writer), self._service.settings.timeout, self._stream.close)
        try:
            await while_connected(request, self.read(lambda pair: None))
        finally:
            self._stream.close()
        return JSONResponse(writer.whole(self.completions))

    async def _events(self, writer: Writer) -> AsyncGenerator[str, None]:
        try:
            for text in writer.begin():
                yield text
            async with contextlib.aclosing(ahead(self.read, self._service.settings.ping_seconds)) as chunks:
                async for found in chunks:
                    for text in [PING] if found is None else writer.add(*found):
                        yield text
            for text in (*writer.end(self.completions), DONE):
                yield text
        except Exception as error:
            for text in writer.fail(error):
                yield text


class Service:
    """The model of a server, once it is loaded.

    Attributes:
        settings: The server's.
        places: Held by each job that is decoded; they are given in order of arrival.
        metrics: The counters.
        started: When it began, in seconds since 1970.
        defaults: The options of a request that does not set them: the settings' before the bundle's own.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.places = asyncio.Semaphore(settings.max_concurrency)
        self.metrics = ServerMetrics()
        self.started = int(time.time())
        self.defaults = settings.defaults
        self._model: LanguageModel | None = None

    @property
    def model(self) -> LanguageModel:
        """The model. Raises RequestError while it is loaded."""
        if self._model is None:
            raise RequestError("Loading model", status=503, code="model_loading")
        return self._model

    @property
    def is_loaded(self) -> bool:
        """Whether the model is there."""
        return self._model is not None

    def loaded(self, model: LanguageModel) -> None:
        """Stores the model. Raises IntegrityError for a generation_config.json that is not valid."""
        # The file sets the sampling, and without `do_sample` it is greedy. Without it, OpenAI's temperature.
        temperature = 0.0 if GENERATION_CONFIG in model.manifest.files else 1.0
        self.defaults = {"temperature": temperature, **model.sampling_defaults, **self.settings.defaults}
        self._model = model
        self.metrics.watch(lambda: model.activity)

    @property
    def fingerprint(self) -> str:
        """A word that is another one for another bundle or runtime."""
        manifest = self.model.manifest
        return f"bundle-{manifest.precision}-{manifest.pastkey_version}"

    def require_model(self, name: str | None, *, adapters: bool = True) -> str:
        """The model's name, or an adapter's. Raises RequestError for another one."""
        names = self.settings.names + (self.settings.adapters if adapters else ())
        if name and name not in names:
            known = " or ".join(repr(one) for one in names)
            raise RequestError(
                f"the model {name!r} is not available; this server has {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    async def open(self, name: str, make: Callable[[LanguageModel], GenerationJob]) -> Running:
        """Makes a job in a thread, and opens it. `name`: of the model or an adapter.

        Raises the error of the job, and QueueFullError.
        """
        model = self.model

        made: list[AsyncStreamMany] = []

        def opened() -> GenerationJob:
            job = make(model)
            if (texts := len(job.prompts) * job.n) > _MOST_TEXTS:
                raise RequestError(f"the request asks for {texts} texts; at most {_MOST_TEXTS} at once", param="n")
            context = model.manifest.context_length
            for prompt in job.prompts:
                if len(prompt.ids) > context:
                    raise RequestError(
                        f"the prompt has {len(prompt.ids)} tokens; this model's maximum context length is {context} "
                        "tokens",
                        param="messages" if isinstance(prompt, ChatPrompt) else "prompt",
                        code="context_length_exceeded",
                    )
            options = {**job.options, "timeout": self.settings.timeout, "reuse_prefix": True}
            if name in self.settings.adapters:
                options["adapter"] = name
            made.append(model.astream_many(job.prompts, job.n, **options))
            return job

        try:
            job = await run_in_threadpool(opened)
        except BaseException:  # also a cancellation while the thread works
            for stream in made:
                stream.close()
            raise
        return Running(self, name, job, made[0])

    def pieces(self, token: int) -> tuple[str, list[int]]:
        """The text of one token, and its bytes."""
        codec = self.model.tokenizer
        written = b"" if codec is None else codec.written(token)
        return written.decode(errors="replace"), list(written)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Awaits work, and cancels it when the client goes away. The body was read before."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done():
            raise RequestError("the client went away", status=499) from None
        task.cancel()
        raise
    finally:
        watcher.cancel()
