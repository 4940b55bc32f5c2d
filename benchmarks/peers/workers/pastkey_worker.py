"""pastkey itself: the code that ships, as the Python that runs this has it installed."""

from __future__ import annotations

from typing import Any

from protocol import serve

from pastkey.bundle import open_bundle
from pastkey.runtime import Session


class Pastkey:
    def __init__(self, model: str, threads: int, context: int) -> None:
        self._bundle = open_bundle(model)
        self._threads = threads
        self._session = Session(self._bundle, threads=threads)

    def start(self, ids: list[int], length: int) -> int:
        self._session.reset()
        return int(self._session.prefill(ids).argmax())

    def step(self, token: int) -> int:
        return int(self._session.decode(token).argmax())

    def logits(self, ids: list[int]) -> Any:
        common = Session(self._bundle, graph="common", threads=self._threads)
        return common.forward([ids])[0]


if __name__ == "__main__":
    serve(Pastkey)
