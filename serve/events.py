"""Server-sent events: how an answer is written, sent and kept alive."""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from pastkey.runtime import Chunk, Completion

from .errors import body_of

Item = TypeVar("Item")
DONE = "data: [DONE]\n\n"
PING = ": ping\n\n"
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Writer(ABC):
    """Writes the answer to a request, as events or whole."""

    def begin(self) -> Iterable[str]:
        """The events before the first chunk."""
        return ()

    @abstractmethod
    def add(self, place: int, chunk: Chunk) -> Iterable[str]:
        """The events of a chunk of the text at a place."""

    @abstractmethod
    def end(self, completions: Sequence[Completion]) -> Iterable[str]:
        """The last events."""

    def fail(self, error: Exception) -> Iterable[str]:
        """The last events of an answer that failed, instead of the others."""
        return [event(body_of(error)[1])]

    @abstractmethod
    def whole(self, completions: Sequence[Completion]) -> Mapping[str, Any]:
        """The reply that is not streamed."""


def event(content: Any, name: str | None = None) -> str:
    """An event with a JSON value."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {_json(content)}\n\n"


class EventStream(StreamingResponse):
    """Sends events until their end, or the client goes away, or reads nothing for `patience` seconds."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], patience: float, close: Callable[[], object]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._patience, self._close = events, patience, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See StreamingResponse."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()  # also where the first event was never asked for

    async def stream_response(self, send: Send) -> None:
        """See StreamingResponse."""

        async def patiently(message: Message) -> None:
            async with asyncio.timeout(self._patience):
                await send(message)

        async with contextlib.aclosing(self._events):
            with contextlib.suppress(TimeoutError):  # uvicorn closes the connection of an incomplete response
                await super().stream_response(patiently)


async def ahead(
    read: Callable[[Callable[[Item], object]], Awaitable[object]], ping_seconds: float
) -> AsyncGenerator[Item | None, None]:
    """Yields the values from `read`, which continues meanwhile, so that a slow client keeps no place of another.

    None is time for a ping. The length of the text bounds the read-ahead.
    """
    found: asyncio.Queue[Item | BaseException] = asyncio.Queue()

    async def pump() -> None:
        try:
            await read(found.put_nowait)
            found.put_nowait(StopAsyncIteration())
        except (Exception, asyncio.CancelledError) as error:  # otherwise a reader waits forever
            found.put_nowait(error)

    task = asyncio.create_task(pump())
    try:
        while True:
            try:
                async with asyncio.timeout(ping_seconds):
                    item = await found.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, StopAsyncIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        task.cancel()
