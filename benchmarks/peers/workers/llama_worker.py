"""llama.cpp, by the functions of llama-cpp-python that lie closest to the library; streams by its class `Llama`."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from itertools import islice

import llama_cpp
import numpy as np
from protocol import in_threads, serve


class LlamaCpp:
    def __init__(self, model: str, threads: int, context: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context + 8
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_batch = max(512, context)
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(context + 8, 0, 1)
        self._length = 0

    def _run(self, ids: list[int], every_position: bool = False) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._length + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every_position or i == len(ids) - 1
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._length += len(ids)

    def _logits_at(self, position: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, position)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))

    def _reset(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._length = 0

    def start(self, ids: list[int], length: int) -> int:
        self._reset()
        self._run(ids)
        return int(self._logits_at(-1).argmax())

    def step(self, token: int) -> int:
        self._run([token])
        return int(self._logits_at(-1).argmax())

    def logits(self, ids: list[int]) -> np.ndarray:
        self._reset()
        self._run(ids, every_position=True)
        return np.stack([self._logits_at(i) for i in range(len(ids))])


class Locked:
    """`Llama` holds one text: streams wait for one another, as in its own server."""

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


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Drops what llama.cpp logs."""


if __name__ == "__main__":
    serve(tokens=LlamaCpp, streams=Locked)
