"""pastkey as an application embeds it: one model, and a thread for each stream, whose text is made, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from protocol import in_threads, serve

from pastkey.contract.bundle import open_bundle
from pastkey.runtime import LanguageModel


class PastkeyStreams:
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


if __name__ == "__main__":
    serve(PastkeyStreams)
