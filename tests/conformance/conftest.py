"""A bundle of the table is exported once for all processes that run the tests."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import pastkey
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.export import export
from pastkey.runtime import Engine

from .bundles import ROWS, Row

Array = npt.NDArray[Any]
KERNELS = importlib.util.find_spec("pastkey_kernels") is not None


@dataclass(frozen=True)
class Made:
    """A row's bundle, and its reference."""

    name: str
    row: Row
    module: nn.Module
    bundle: Bundle

    def ids(self, count: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(0, self.bundle.manifest.vocab_size, count).tolist()

    def engine(self, **options: Any) -> Engine:
        return Engine(self.bundle, providers="cpu", threads=1, native=self.row.native, **options)

    def engines(self) -> list[Engine]:
        """One of each graph that the runtime opens."""
        return [self.engine()] if self.row.native else [self.engine(), self.engine(graph="all_logits")]

    def load(self) -> Any:
        return pastkey.load(self.bundle.path, "cpu", threads=1, native=self.row.native)

    def of_source(self, ids: list[int]) -> Array:
        """Logits (T, V) in torch, without a cache."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return self.row.call(self.module, torch.tensor([ids]))[0].numpy()

    @functools.cached_property
    def _alone(self) -> Engine:
        return Engine(self.bundle, providers="cpu", native=False, graph="all_logits", threads=1)

    def expected(self, ids: list[int]) -> Array:
        """Logits (T, V) that every path must give: of the source, or, where weights are rounded, of one run."""
        if self.row.precision == "fp32":
            return self.of_source(ids)
        self._alone.reset()
        return self._alone.all_logits(ids)

    def require_close(self, found: Array, expected: Array) -> None:
        assert found.shape == expected.shape
        off = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert off <= self.row.limits[1], f"{off:.1e} of the largest logit"


@pytest.fixture(scope="session", autouse=True)
def short(short_exports):
    """Exports of these tests are short."""


@pytest.fixture(scope="session")
def made(made_once):
    """made(NAME): the row of that name. A native one uses the bundle of its twin without."""

    @functools.cache
    def make(name: str) -> Made:
        row = ROWS[name]
        if row.native and not KERNELS:
            pytest.skip("the native kernels are not installed: pip install ./kernels")
        bundle = name.removesuffix("-native")
        given = ROWS[bundle]
        settings = {"precision": given.precision, "context_length": given.context, **given.options}
        folder = made_once(f"conformance-{bundle}", lambda folder: export(given.build(), folder / "b", **settings))
        return Made(name, row, row.build(), open_bundle(folder / "b", verify=False))

    return make


@pytest.fixture
def this(request, made, monkeypatch):
    """The row that the test is of. Those of a window have so small caches and chunks that rows are evicted."""
    if request.param.startswith("window"):
        for constant in ("caches.capacity.GROWTH_STEP", "decoder_graph.PREFILL_CHUNK", "decoder_graph.NATIVE_CHUNK"):
            monkeypatch.setattr(f"pastkey.runtime.engine.{constant}", 8)
    return made(request.param)
