"""onnxruntime-genai with one Generator for all streams: they begin and end together, and nobody joins."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from genai_worker import Genai
from protocol import serve


class GenaiBatch(Genai):
    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        """The prompts are of one length, so that nothing is padded."""
        generator = self._fresh(len(prompts[0]) + new_tokens, batch_size=len(prompts))
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            for place, token in enumerate(generator.get_next_tokens()):
                told(place, int(token))


if __name__ == "__main__":
    serve(GenaiBatch)
