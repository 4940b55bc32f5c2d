"""A stream in an event loop: a thread waits for tokens, and cancelling the task ends it within one step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from types import TracebackType
from typing import Self

from .completion import Chunk, Completion
from .stream import ChunkStream


class AsyncStream(AsyncGenerator[Chunk, None]):
    """Yields a Chunk for each new token, as Stream does. One task reads it."""

    def __init__(self, stream: ChunkStream, executor: Executor) -> None:
        self._stream, self._executor = stream, executor

    @property
    def completion(self) -> Completion | None:
        """The completion after the end; after `aclose`, with the yielded tokens."""
        return self._stream.completion

    async def __anext__(self) -> Chunk:
        step = asyncio.get_running_loop().run_in_executor(self._executor, next, self._stream, None)
        try:
            chunk = await asyncio.shield(step)
        except asyncio.CancelledError:
            self.cancel()
            step.add_done_callback(self._end)
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def asend(self, value: None) -> Chunk:
        """As `anext`."""
        del value
        return await self.__anext__()

    async def athrow(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        traceback: TracebackType | None = None,
    ) -> Chunk:
        """Ends it, and raises the error."""
        await self.aclose()
        return self._stream.throw(kind, value, traceback)

    async def aclose(self) -> None:
        """Ends it within one step."""
        self._stream.close()

    def cancel(self) -> None:
        """Ends it within one step. The reader gets the end, with the tokens generated so far."""
        self._stream.cancel()

    async def completed(self) -> Completion:
        """Reads it to its end."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        assert self.completion is not None
        return self.completion

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def _end(self, step: asyncio.Future[Chunk | None]) -> None:
        """The step that a cancelled task had asked for is over."""
        if not step.cancelled():
            step.exception()  # nobody else is told
        self._stream.close()
