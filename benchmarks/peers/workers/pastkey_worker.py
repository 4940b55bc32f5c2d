"""pastkey itself: the code that ships, as the Python that runs this has it installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from protocol import in_threads, serve

from pastkey.contract.bundle import open_bundle
from pastkey.runtime import Engine, Generation, LanguageModel, Request


class Pastkey:
    prompt_lookup = True  # as `generate` has it
    native: bool | None = None  # as `load` has it

    def __init__(self, model: str, threads: int, context: int) -> None:
        self._bundle = open_bundle(model)
        self._threads = threads
        self._session = Engine(self._bundle, threads=threads, native=self.native)
        self._tokens: Iterator[int] = iter(())

    def start(self, ids: list[int], length: int) -> int:
        new = length - len(ids) + 1  # the last one is not fed, and ends what is measured
        request = Request(ids, max_new_tokens=new, prompt_lookup=self.prompt_lookup)
        self._tokens = iter(Generation(self._session, request))
        return next(self._tokens)

    def step(self, token: int) -> int:
        return next(self._tokens)

    def logits(self, ids: list[int]) -> Any:
        common = Engine(self._bundle, graph="all_logits", threads=self._threads, native=self.native)
        return common.forward([ids])[0]


class TokenByToken(Pastkey):
    """A step for each token, as the other engines decode."""

    prompt_lookup = False


class OnnxruntimeKernels(TokenByToken):
    """The same without pastkey's own kernels."""

    native = False


class Streams:
    """As an application embeds it: one model, and a thread for each stream, whose text is also computed."""

    prompt_lookup = True

    def __init__(self, model: str, threads: int, context: int) -> None:
        bundle = open_bundle(model)
        endless = dataclasses.replace(bundle.manifest, eos_token_ids=())  # an end token must not end a stream early
        self._model = LanguageModel(dataclasses.replace(bundle, manifest=endless), threads=threads)

    def _stream(self, ids: list[int], new_tokens: int) -> Iterator[int]:
        for chunk in self._model.stream(ids, max_new_tokens=new_tokens, prompt_lookup=self.prompt_lookup):
            yield from chunk.ids

    def streams(self, prompts: list[list[int]], new_tokens: int, told: Callable[[int, int], None]) -> None:
        in_threads(self._stream, prompts, new_tokens, told)


class StepStreams(Streams):
    prompt_lookup = False


if __name__ == "__main__":
    serve(tokens=Pastkey, steps=TokenByToken, ort=OnnxruntimeKernels, streams=Streams, step_streams=StepStreams)
