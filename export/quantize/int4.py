"""int4 from a verified float32 bundle: 4 bits for most projections, 8 bits for the most sensitive ones.

1. GPTQ rounds every matrix except embeddings and the output head to 4 bits, on calibration text (`int4_blocks`).
2. The sensitivity of each matrix is measured, with all others in float32 (`sensitivity`).
3. The matrices with the highest sensitivity per weight are int8: one weight in 32, or more for `--max-kl` (`search`).

Scales are not migrated as for int8: that makes activations easier to round and weights harder, which hurts 4 bits most.

Embeddings and the output head are int8, as in an int8 bundle: in a small model they are a quarter of all weights, and
in 4 bits they add as much error as all others together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from pastkey.contract.bundle import Bundle
from pastkey.providers import TARGETS

from ..graph.write.output_head import output_head
from ..measure.metrics import Ids
from ..progress import SILENT, Progress
from ..settings import ExportConfig
from .calibrate.activations import probing
from .calibrate.calibration import CalibrationText
from .ranking.sensitivity import Sensitivity, sensitivity
from .rounding.blocks import Blocks, choose_block_size
from .rounding.int4_blocks import round_by_hessian, round_to_nearest
from .rounding.rewrite import embedding_weight, matmul_weight, not_finite, quantize
from .search import Quantized, Write, search

_PROBED = 1  # windows that sensitivity is measured on
_INT8_SHARE = 1 / 32  # of the weights that may be 4-bit


def make_int4(fp32: Bundle, text: CalibrationText, write: Write, config: ExportConfig, progress: Progress) -> Quantized:
    """Rounds, measures each matrix, writes and measures; with `max_kl`, until the budget is met.

    The most sensitive matrices become int8. Raises InputError on NaN or infinity, and QualityError if the budget is
    missed with every projection in int8.
    """
    return search(_Int4Mixtures(fp32, text, config, progress), fp32, text, write, config.max_kl)


class _Int4Mixtures:
    """Every projection in 4 bits, except the most sensitive per weight, which are int8 like embeddings and the head."""

    precision = "int4"

    def __init__(self, fp32: Bundle, text: CalibrationText, config: ExportConfig, progress: Progress) -> None:
        self._graph = fp32.all_logits_graph
        self._form = TARGETS[config.target].form
        progress.stage("round to 4 bits by GPTQ")
        self._rounded = rounded(ir.load(self._graph), self._graph.parent, text.calibration_set, progress)
        progress.stage("measure what each matrix costs in int4")
        self.sensitivity: Sensitivity = sensitivity(
            ir.load(self._graph),
            self._graph.parent,
            text.calibration_set[:_PROBED],
            config.max_kl,
            precision=self.precision,
            rounded=self._rounded,
            progress=progress,
        )
        self.start = max(in_int8(self.sensitivity), len(self.sensitivity.keep))

    def model(self, raised: int) -> ir.Model:
        in_8_bits = self.sensitivity.worst(raised)
        model = ir.load(self._graph)
        in_4_bits = {name: matrix for name, matrix in self._rounded.items() if name not in in_8_bits}
        quantize(model, rounded=in_4_bits, form=self._form)
        return model

    def quality(self, raised: int) -> dict[str, Any]:
        return {"int8_weights": list(self.sensitivity.worst(raised))}

    def asked_for(self) -> int:
        return self.start

    def most(self) -> int:
        return len(self.sensitivity.ranking)


def in_int8(table: Sensitivity) -> int:
    """Returns how many of the first in the ranking are always int8: as many as fit into their share of the weights."""
    sizes = {row.weight: float(np.prod(row.shape)) for row in table.rows}
    filled = np.cumsum([sizes[name] for name in table.ranking])
    return int((filled <= _INT8_SHARE * filled[-1]).sum()) if len(filled) else 0


def rounded(model: ir.Model, folder: Path, windows: Sequence[Ids], progress: Progress = SILENT) -> dict[str, Blocks]:
    """Returns the 4-bit matrices of a float32 graph by initializer name, calibrated on windows (T,) of token ids.

    `folder` holds the weights file that the graph names.
    """
    matmuls = _matmuls(model)
    if not matmuls:
        return {}
    wanted = list(dict.fromkeys(_activation(node) for nodes in matmuls.values() for node in nodes))
    with probing(model, folder, wanted) as probe:
        hessians = {name: np.zeros((0, 0), np.float32) for name in wanted}
        for ids in windows:
            for name, rows in probe(ids).items():
                square = rows.T @ rows
                hessians[name] = square if hessians[name].size == 0 else hessians[name] + square
    with _one_thread_each() as pool:
        found = {}
        rounded_in_order = pool.map(lambda nodes: _rounded(nodes, hessians), matmuls.values())
        for number, (name, matrix) in enumerate(zip(matmuls, rounded_in_order, strict=True), 1):
            found[name] = matrix
            progress.advance(number, len(matmuls))
        return found


@contextlib.contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool for torch's matrix work, one thread each: threads that share many small steps wait for one another."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _rounded(nodes: list[ir.Node], hessians: dict[str, np.ndarray]) -> Blocks:
    """Rounds a weight that MatMuls share, by the sum of the Hessians of their inputs."""
    found = matmul_weight(nodes[0])
    assert found is not None
    matrix = found.matrix
    try:
        hessian = np.sum([hessians[_activation(node)] for node in nodes], axis=0)
        return round_by_hessian(matrix, hessian, choose_block_size(matrix.shape[1]))
    except ValueError as error:
        raise not_finite(found.initializer, error) from None


def _activation(matmul: ir.Node) -> str:
    """Returns the name of the MatMul's input."""
    assert matmul.inputs[0] is not None
    return str(matmul.inputs[0].name)


def _matmuls(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Returns the MatMuls that may be 4-bit, by their weight: all except the head and gathered matrices."""
    head = output_head(model)
    excluded = {embedding.name for node in model.graph if (embedding := embedding_weight(node)) is not None}
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        read = matmul_weight(node)
        if read is None:
            continue
        if node is head or node.inputs[0] is None or node.inputs[0].producer() is None:
            excluded.add(read.initializer.name)
        else:
            found.setdefault(str(read.initializer.name), []).append(node)
    return {name: nodes for name, nodes in found.items() if name not in excluded}


def rounded_to_nearest(model: ir.Model, progress: Progress = SILENT) -> dict[str, Blocks]:
    """Returns the 4-bit matrices of a float32 graph by initializer name, each weight rounded by itself."""
    found, matmuls = dict[str, Blocks](), _matmuls(model)
    for name, nodes in matmuls.items():
        read = matmul_weight(nodes[0])
        assert read is not None
        matrix = read.matrix
        try:
            found[name] = round_to_nearest(matrix, choose_block_size(matrix.shape[1]))
        except ValueError as error:
            raise not_finite(read.initializer, error) from None
        progress.advance(len(found), len(matmuls))
    return found
