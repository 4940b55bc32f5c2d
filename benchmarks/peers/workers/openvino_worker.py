"""openvino-genai, by its pipeline of continuous batching, which its class `LLMPipeline` drives as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import serve

BATCH = 4096  # tokens of a prompt at once; the default, 256, is slower
DRAFT, NGRAM = 5, 3  # tokens, as its example has them


class OpenVino:
    prompt_lookup = False

    def __init__(self, model: str, threads: int, context: int) -> None:
        self._graph = Path(model) / "openvino_model.xml"
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "KV_CACHE_PRECISION": "f16",  # the default, u8, is slower behind long texts
        }
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 1, BATCH
        drafts = {"prompt_lookup": True} if self.prompt_lookup else {}
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", self._settings | drafts)
        self._requests = 0
        self._answer: Any = None
        self._tokens: list[int] = []  # that it has computed, and nobody has been told

    def start(self, ids: list[int], length: int) -> int:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = length - len(ids) + 1, True
        if self.prompt_lookup:
            config.num_assistant_tokens, config.max_ngram_size = DRAFT, NGRAM
        self._requests += 1
        self._answer = self._pipeline.add_request(self._requests, ov.Tensor(np.array([ids], np.int64)), config)
        return self._next()

    def step(self, token: int) -> int:
        return self._next()

    def _next(self) -> int:
        while not self._tokens:  # a prompt needs several steps
            self._pipeline.step()
            while self._answer.can_read():
                (found,) = self._answer.read().values()
                self._tokens += found.generated_ids
        return self._tokens.pop(0)

    def logits(self, ids: list[int]) -> Any:
        """Of the same graph without the pipeline, which keeps only the last position's."""
        graph = ov.Core().compile_model(self._graph, "CPU", self._settings)
        count = len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return graph({port.any_name: inputs[port.any_name] for port in graph.inputs})["logits"][0]


class PromptLookup(OpenVino):
    """Its own drafts from repeated text."""

    prompt_lookup = True


if __name__ == "__main__":
    serve(tokens=OpenVino, lookup=PromptLookup)
