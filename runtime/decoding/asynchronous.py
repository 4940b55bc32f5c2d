"""Streams for asyncio: a thread waits for tokens; cancelling the task ends the stream within one step."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from .completion import Chunk, Completion
from .many import StreamMany
from .stream import ChunkStream, Readable

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Executor

Piece = TypeVar("Piece")
Whole = TypeVar("Whole")


class AsyncReadable(AsyncIterator[Piece], Generic[Piece, Whole]):
    """The base of asynchronous streams. Only one task may read one."""

    def __init__(self, stream: Readable[Piece, Whole], executor: Executor) -> None:
        self._stream, self._executor = stream, executor

    async def __anext__(self) -> Piece:
        piece = await self._in_thread(next, self._stream, None)
        if piece is None:
            raise StopAsyncIteration
        return piece  # type: ignore[no-any-return]

    async def read(self, take: Callable[[Piece], object]) -> None:
        """Reads to the end in one thread, as fast as it goes. `take` gets each piece, in the event loop."""
        import asyncio  # 15 ms that only applications with an event loop spend

        loop = asyncio.get_running_loop()

        def read() -> None:
            for piece in self._stream:
                loop.call_soon_threadsafe(take, piece)

        await self._in_thread(read)

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the reader of the stream. A cancellation ends the stream within one step."""
        import asyncio

        step = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            self.cancel()
            step.add_done_callback(self._end)
            raise

    def close(self) -> None:
        """Ends the stream within one step."""
        self._stream.close()

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    def cancel(self) -> None:
        """Ends the stream within one step. The reader gets the end, with the tokens decoded so far."""
        self._stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def _end(self, step: asyncio.Future[Any]) -> None:
        """Closes the stream after the last step of a cancelled task."""
        if not step.cancelled():
            step.exception()  # marks it as retrieved, or asyncio would log it
        self._stream.close()


class AsyncStream(AsyncReadable[Chunk, Completion]):
    """Yields a Chunk for each new token, as Stream does. Only one task may read it."""

    _stream: ChunkStream

    @property
    def completion(self) -> Completion | None:
        """The completion, once the stream has ended; after `aclose`, of the yielded tokens."""
        return self._stream.completion

    async def completed(self) -> Completion:
        """Reads the stream to its end and returns the completion."""
        try:
            async for _ in self:
                pass
        finally:
            await self.aclose()
        assert self.completion is not None
        return self.completion


class AsyncStreamMany(AsyncReadable[tuple[int, Chunk], list[Completion]]):
    """Yields pairs of a place and a Chunk, as StreamMany does. Only one task may read it."""

    _stream: StreamMany

    @property
    def completions(self) -> list[Completion | None]:
        """The completions by place; None while one runs."""
        return self._stream.completions
