"""Streams for asyncio: a thread waits for tokens; cancelling the task ends the stream within one step."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Self

from .completion import Chunk, Completion
from .stream import ChunkStream

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Executor


class AsyncStream(AsyncIterator[Chunk]):
    """Yields a Chunk for each new token, as Stream does. Only one task may read it."""

    def __init__(self, stream: ChunkStream, executor: Executor) -> None:
        self._stream, self._executor = stream, executor

    @property
    def completion(self) -> Completion | None:
        """The completion, once the stream has ended; after `aclose`, of the yielded tokens."""
        return self._stream.completion

    async def __anext__(self) -> Chunk:
        import asyncio  # 15 ms that only applications with an event loop spend

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

    async def aclose(self) -> None:
        """Ends the stream within one step."""
        self._stream.close()

    def cancel(self) -> None:
        """Ends the stream within one step. The reader gets the end, with the tokens decoded so far."""
        self._stream.cancel()

    async def completed(self) -> Completion:
        """Reads the stream to its end and returns the completion."""
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
        """Closes the stream after the last step of a cancelled task."""
        if not step.cancelled():
            step.exception()  # marks it as retrieved, or asyncio would log it
        self._stream.close()
