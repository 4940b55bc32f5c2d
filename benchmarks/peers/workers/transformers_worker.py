"""transformers in torch, float32, eager attention, with its usual cache."""

from __future__ import annotations

from typing import Any

import torch
from protocol import serve
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    def __init__(self, model: str, threads: int, context: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._cache: Any = None

    def _run(self, ids: list[int]) -> int:
        with torch.inference_mode():
            found = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    def start(self, ids: list[int], length: int) -> int:
        self._cache = DynamicCache(config=self._model.config)
        return self._run(ids)

    def step(self, token: int) -> int:
        return self._run([token])

    def logits(self, ids: list[int]) -> Any:
        with torch.inference_mode():
            return self._model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


if __name__ == "__main__":
    serve(tokens=Transformers)
