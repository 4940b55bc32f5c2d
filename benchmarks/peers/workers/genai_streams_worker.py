"""onnxruntime-genai with a Generator for each stream over one Model, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from genai_worker import Genai
from protocol import in_threads, serve


class GenaiStreams(Genai):
    def _stream(self, ids: list[int], new_tokens: int) -> Iterator[int]:
        generator = self._fresh(len(ids) + new_tokens)
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        in_threads(self._stream, prompts, new_tokens, told)


if __name__ == "__main__":
    serve(GenaiStreams)
