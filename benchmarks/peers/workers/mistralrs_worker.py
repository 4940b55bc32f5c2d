"""mistral.rs, by its class `Runner`, which accepts and returns text and gives no logits of a prompt."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mistralrs import ChatCompletionRequest, Runner, Which
from protocol import serve


class MistralRs:
    def __init__(self, model: str, threads: int, context: int) -> None:
        for pool in ("RAYON", "CANDLE"):  # read where the pools begin, with the model
            os.environ[f"{pool}_NUM_THREADS"] = str(threads)
        file = Path(model)
        which = Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name)
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
            template.write("{{ messages[0]['content'] }}")  # a prompt is given as it is
            template.flush()
            self._runner = Runner(
                which, max_seqs=1, prefix_cache_n=0, jinja_explicit=template.name, token_source="none"
            )
        self._chunks: Iterator[Any] = iter(())

    def start(self, ids: list[int], length: int) -> int:
        prompt = self._runner.detokenize_text(ids, skip_special_tokens=False)
        request = ChatCompletionRequest(
            prompt,
            "default",
            max_tokens=length - len(ids) + 1,
            temperature=0.0,
            ignore_eos=True,
            stream=True,
            logprobs=True,  # which has the ids
            top_logprobs=1,
        )
        self._chunks = iter(self._runner.send_chat_completion_request(request))
        return self._next()

    def step(self, token: int) -> int:
        return self._next()

    def _next(self) -> int:
        """-1 behind the end: a token that ends inside a character has no chunk, and some chunks have no token."""
        for chunk in self._chunks:
            told = chunk.choices[0].logprobs
            if told is not None:
                return int(told.top_logprobs[0].token)
        return -1

    def logits(self, ids: list[int]) -> Any:
        raise NotImplementedError


if __name__ == "__main__":
    serve(tokens=MistralRs)
