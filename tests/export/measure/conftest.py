"""Bundles that were changed after their export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract.bundle import Bundle


@pytest.fixture
def altered(tmp_path):
    """altered(BUNDLE, CHANGE): a copy both of whose graphs were changed, with a manifest of the old ones."""

    def alter(bundle: Bundle, change: Callable[[ir.Model], None]) -> Bundle:
        copy = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "altered")), bundle.manifest)
        for path in (copy.all_logits_graph, copy.last_logits_graph):
            model = ir.load(path)
            change(model)
            ir.save(model, path)
        return copy

    return alter


def scaled(name: str, factor: float) -> Callable[[ir.Model], None]:
    """Multiplies the first row of a weight."""

    def change(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[0] *= np.float32(factor)
        value.const_value = ir.tensor(array)

    return change
