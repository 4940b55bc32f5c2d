"""Generations that programs of other languages are asked for, and the texts of pastkey's own runtime."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.runtime import Engine, Generation, Request, SamplingConfig

from ..shared import ROOT, ran

EXAMPLES = ROOT / "examples"
FLOAT32 = ("generate-fp32", "generate-standard-fp32", "generate-gpt2-fp32")
BUNDLES = (*FLOAT32, "generate-int8")
VOCABULARY, CONTEXT = 320, 64  # of all of them

SAMPLING = (
    SamplingConfig(seed=0),
    SamplingConfig(repetition_penalty=1.4, seed=0),
    SamplingConfig(temperature=1.0, seed=3),
    SamplingConfig(temperature=1.7, seed=2**63 - 1),
    SamplingConfig(temperature=0.7, top_k=20, seed=11),
    SamplingConfig(temperature=1.3, top_p=0.9, seed=2**53 + 1),  # which a number of JavaScript cannot hold
    SamplingConfig(temperature=1.2, min_p=0.05, seed=2**32),
    SamplingConfig(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=2**62 + 5),
)


@dataclass(frozen=True)
class Call:
    prompt: list[int]
    sampling: SamplingConfig
    new_tokens: int = 24
    ends: tuple[int, ...] = ()

    def expected(self, engine: Engine) -> list[int]:
        """pastkey's ids, and the end token behind them, as the graph gives it."""
        given: dict[str, Any] = {"max_new_tokens": self.new_tokens, "sampling": self.sampling, "prompt_lookup": False}
        made = [*Generation(engine, Request(self.prompt, **given))]
        end = next((place for place, token in enumerate(made) if token in self.ends), len(made))
        return made[: end + 1]

    def settings(self) -> dict[str, Any]:
        """In the form of examples/generate/generate.mjs."""
        given: dict[str, Any] = {name: getattr(self.sampling, name) for name in ("top_k", *names.GENERATE_NUMBERS)}
        given |= {"seed": str(self.sampling.seed), "max_new_tokens": self.new_tokens, "end_ids": self.ends}
        return {re.sub("_(.)", lambda found: found[1].upper(), name): value for name, value in given.items()}

    def words(self) -> list[str]:
        """In the form of the other examples' command lines."""
        s = self.sampling
        numbers = [self.new_tokens, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed]
        return [*map(str, numbers), " ".join(map(str, self.ends)), *map(str, self.prompt)]


def calls() -> list[Call]:
    """Three texts of each way of choosing, some that an end ends, and some that the context ends."""
    rng = np.random.default_rng(5)
    ways = [(length, sampling) for sampling in SAMPLING for length in (1, 7, 20)]
    made = [Call(rng.integers(0, VOCABULARY, length).tolist(), sampling) for length, sampling in ways]
    likely = (12, 14, 266, 267, 268)
    made += [dataclasses.replace(call, ends=likely) for call in made[::2]]
    for count, new_tokens in ((CONTEXT, 5), (CONTEXT - 2, 9), (3, 0), (3, 200)):
        made.append(Call(rng.integers(0, VOCABULARY, count).tolist(), SAMPLING[7], new_tokens))
    return made


@functools.cache
def expected(bundle: Path) -> list[list[int]]:
    """Of each of the calls."""
    engine = Engine(open_bundle(bundle), providers="cpu", threads=1)
    wanted = calls()
    texts = [call.expected(engine) for call in wanted]
    drawn = [tuple(text) for call, text in zip(wanted, texts, strict=True) if call.sampling.temperature]
    assert len(set(drawn)) >= 0.6 * len(drawn)  # chance had a say
    return texts


def library() -> Path:
    """The shared library of Python's package."""
    (file,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return file


def answers_of(program: Sequence[str | Path], graph: Path, wanted: Sequence[Call], **more: str) -> list[list[int]]:
    told = (ran(*program, graph, *call.words(), env=os.environ | more, timeout=60).stdout for call in wanted)
    return [[int(token) for token in text.split()] for text in told]
