"""onnxruntime-genai, on a folder that its own model builder wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from protocol import in_threads, serve


class Genai:
    def __init__(self, model: str, threads: int, context: int) -> None:
        vocab_size = json.loads((Path(model) / "genai_config.json").read_text())["model"]["vocab_size"]
        config = og.Config(model)
        # An end token must not end a run early: the least likely id replaces it.
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"eos_token_id": vocab_size - 1, "decoder": options}}))
        self._model = og.Model(config)
        self._generator: og.Generator | None = None

    def _fresh(self, length: int, batch_size: int = 1) -> og.Generator:
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length + 1, do_sample=False, batch_size=batch_size)
        return og.Generator(self._model, parameters)

    def start(self, ids: list[int], length: int) -> int:
        self._generator = self._fresh(length)
        self._generator.append_tokens(np.array(ids, np.int32))
        return self._next()

    def step(self, token: int) -> int:
        return self._next()

    def _next(self) -> int:
        assert self._generator is not None
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def logits(self, ids: list[int]) -> Any:
        generator = self._fresh(len(ids))
        generator.append_tokens(np.array(ids, np.int32))
        return generator.get_output("logits")[0]


class GeneratorEach(Genai):
    """A Generator for each stream over one Model, each in a separate thread."""

    def _stream(self, ids: list[int], new_tokens: int) -> Iterator[int]:
        generator = self._fresh(len(ids) + new_tokens)
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        in_threads(self._stream, prompts, new_tokens, told)


class OneBatch(Genai):
    """One Generator for all streams: they begin and end together, and nobody joins."""

    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        """The prompts are of one length, so that nothing is padded."""
        generator = self._fresh(len(prompts[0]) + new_tokens, batch_size=len(prompts))
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            for place, token in enumerate(generator.get_next_tokens()):
                told(place, int(token))


if __name__ == "__main__":
    serve(tokens=Genai, streams=GeneratorEach, batch=OneBatch)
