"""llama-cpp-python's `Llama`, which holds one text: streams wait for one another, as in its own server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice

import llama_cpp
from protocol import in_threads, serve


class LlamaStreams:
    def __init__(self, model: str, threads: int, context: int) -> None:
        self._llama = llama_cpp.Llama(
            model, n_ctx=context + 8, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._lock = threading.Lock()

    def _stream(self, ids: list[int], new_tokens: int) -> Iterator[int]:
        with self._lock:
            self._llama.reset()
            yield from islice(self._llama.generate(ids, temp=0.0), new_tokens)

    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        in_threads(self._stream, prompts, new_tokens, told)


if __name__ == "__main__":
    serve(LlamaStreams)
