"""pastkey itself: the code that ships, as the Python that runs this has it installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from protocol import serve

from pastkey.contract.bundle import open_bundle
from pastkey.runtime import Engine, Generation, Request


class Pastkey:
    prompt_lookup = True  # as `generate` has it

    def __init__(self, model: str, threads: int, context: int) -> None:
        self._bundle = open_bundle(model)
        self._threads = threads
        self._session = Engine(self._bundle, threads=threads)
        self._tokens: Iterator[int] = iter(())

    def start(self, ids: list[int], length: int) -> int:
        new = length - len(ids) + 1  # the last one is not fed, and ends what is measured
        self._tokens = iter(
            Generation(self._session, Request(ids, max_new_tokens=new, prompt_lookup=self.prompt_lookup))
        )
        return next(self._tokens)

    def step(self, token: int) -> int:
        return next(self._tokens)

    def logits(self, ids: list[int]) -> Any:
        common = Engine(self._bundle, graph="all_logits", threads=self._threads)
        return common.forward([ids])[0]


if __name__ == "__main__":
    serve(Pastkey)
