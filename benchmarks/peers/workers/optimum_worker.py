"""optimum's ORTModelForCausalLM, called as its own `generate` calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from onnxruntime import SessionOptions
from optimum.onnxruntime import ORTModelForCausalLM
from protocol import serve


class Optimum:
    def __init__(self, model: str, threads: int, context: int) -> None:
        torch.set_num_threads(threads)
        options = SessionOptions()
        options.intra_op_num_threads = threads
        (graph,) = Path(model).glob("*.onnx")
        self._model = ORTModelForCausalLM.from_pretrained(model, file_name=graph.name, session_options=options)
        self._past: Any = None
        self._length = 0

    def _run(self, ids: list[int]) -> torch.Tensor:
        total = self._length + len(ids)
        found = self._model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, total, dtype=torch.int64),
            position_ids=torch.arange(self._length, total)[None],
            past_key_values=self._past,
            use_cache=True,
        )
        self._past, self._length = found.past_key_values, total
        return found.logits[0]

    def start(self, ids: list[int], length: int) -> int:
        self._past, self._length = None, 0
        return int(self._run(ids)[-1].argmax())

    def step(self, token: int) -> int:
        return int(self._run([token])[-1].argmax())

    def logits(self, ids: list[int]) -> Any:
        self._past, self._length = None, 0
        return self._run(ids).numpy()


if __name__ == "__main__":
    serve(tokens=Optimum)
