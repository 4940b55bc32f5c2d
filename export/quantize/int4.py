"""int4 from a verified float32 bundle: 4 bits for most projections, 8 bits for the most sensitive ones.

1. GPTQ rounds every matrix except embeddings and the output head to 4 bits, on calibration text (`int4_blocks`).
2. Matrices are ranked by how much of their products on that text rounding loses, per weight. With `--sensitivity` or
   `--max-kl`, each is measured instead, with all others in float32 (`sensitivity`).
3. The first of the ranking are int8: one weight in 24, or more for `--max-kl` (`search`).

Scales are not migrated as for int8: that makes activations easier to round and weights harder, which hurts 4 bits most.

Embeddings and the output head are int8, as in an int8 bundle: in a small model they are a quarter of all weights, and
in 4 bits they add as much error as all others together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pastkey.contract.bundle import Bundle
from pastkey.files.memory import keeping_memory
from pastkey.providers import TARGETS

from ..graph.blocks import Blocks
from ..graph.write.output_head import output_head
from ..measure.metrics import Ids
from ..progress import SILENT, Progress
from ..settings import ExportConfig
from .calibrate.calibration import CalibrationText
from .calibrate.segments import captured
from .ranking.sensitivity import Sensitivity, sensitivity
from .rounding.blocks import choose_block_size
from .rounding.finished import keep_rounded, read_rounded
from .rounding.int4_blocks import Gptq, Rounded, round_to_nearest
from .rounding.matrices import MatMulWeight, embedding_weight, matmul_weight
from .rounding.rewrite import not_finite, quantize
from .rounding.workers import one_thread_each
from .search import Quantized, Write, search

_PROBED = 1  # windows that sensitivity is measured on
_TOGETHER = 8  # windows whose X^T X is one product: a matrix (K, K) is slow to make and to add
_INT8_SHARE = 1 / 24  # of the weights that may be 4-bit


def make_int4(
    fp32: Bundle,
    text: CalibrationText,
    write: Write,
    config: ExportConfig,
    progress: Progress,
    finished: Path | None = None,
) -> Quantized:
    """Rounds, ranks, writes and measures; with `max_kl`, until the budget is met.

    The most sensitive matrices become int8. `finished` is the folder of matrices that a killed export rounded, None to
    keep none. Raises InputError on NaN or infinity, and QualityError if the budget is missed with every projection in
    int8.
    """
    return search(_Int4Mixtures(fp32, text, config, progress, finished), fp32, text, write, config.max_kl, progress)


class _Int4Mixtures:
    """Every projection in 4 bits, except the most sensitive per weight, which are int8 like embeddings and the head."""

    precision = "int4"

    def __init__(
        self, fp32: Bundle, text: CalibrationText, config: ExportConfig, progress: Progress, finished: Path | None
    ) -> None:
        self._graph = fp32.all_logits_graph
        self._form = TARGETS[config.target].form
        progress.stage("round to 4 bits by GPTQ")
        found = rounded(ir.load(self._graph), self._graph.parent, text.calibration_set, progress, finished)
        self._rounded = {name: matrix.blocks for name, matrix in found.items()}
        self.sensitivity: Sensitivity | None = None
        self._ranking, kept = by_error(found), 0
        if config.measures_each_matrix:
            progress.stage("measure what each matrix costs in int4")
            self.sensitivity = sensitivity(
                ir.load(self._graph),
                self._graph.parent,
                text.calibration_set[:_PROBED],
                config.max_kl,
                precision=self.precision,
                rounded=self._rounded,
                progress=progress,
            )
            self._ranking, kept = self.sensitivity.ranking, len(self.sensitivity.keep)
        self.start = max(in_int8([self._rounded[name].weights for name in self._ranking]), kept)

    def model(self, raised: int) -> ir.Model:
        in_8_bits = self._ranking[:raised]
        model = ir.load(self._graph)
        in_4_bits = {name: matrix for name, matrix in self._rounded.items() if name not in in_8_bits}
        quantize(model, blocks=in_4_bits, form=self._form)
        return model

    def quality(self, raised: int) -> dict[str, Any]:
        return {"int8_weights": list(self._ranking[:raised])}

    def asked_for(self) -> int:
        return self.start

    def most(self) -> int:
        return len(self._ranking)


def in_int8(sizes: Sequence[int]) -> int:
    """Returns how many of the ranked matrices are always int8, by their weights: those that fit into their share."""
    filled = np.cumsum(sizes)
    return int((filled <= _INT8_SHARE * filled[-1]).sum()) if len(filled) else 0


def by_error(found: Mapping[str, Rounded]) -> tuple[str, ...]:
    """Returns the names of the matrices, first those whose products lose most by rounding, per weight."""
    return tuple(sorted(found, key=lambda name: -found[name].error / found[name].blocks.weights))


@keeping_memory()
def rounded(
    model: ir.Model,
    folder: Path,
    windows: Sequence[Ids],
    progress: Progress = SILENT,
    finished: Path | None = None,
) -> dict[str, Rounded]:
    """Returns the 4-bit matrices of a float32 graph by initializer name, calibrated on windows (T,) of token ids.

    `folder` holds the weights file that the graph names. Hessians of one segment of the graph at a time are in memory.
    Matrices in the folder `finished` are read there, and others are written there.
    """
    waiting: dict[tuple[str, ...], list[MatMulWeight]] = {}  # by the activations that the matrices are multiplied with
    sizes, done, matmuls = dict[str, int](), dict[str, Rounded](), _matmuls(model)
    for initializer, nodes in matmuls.items():
        read = matmul_weight(nodes[0])
        assert read is not None
        activations = tuple(sorted({_activation(node) for node in nodes}))
        sizes |= dict.fromkeys(activations, 4 * read.shape[1] ** 2)
        if (before := None if finished is None else read_rounded(finished, initializer)) is not None:
            done[initializer] = before
        else:
            waiting.setdefault(activations, []).append(read)
    if done:
        progress.say(f"read {len(done)} of {len(matmuls)} matrices that an earlier export rounded, from {finished}")
    segments = captured(model, folder, windows, sizes) if waiting else []
    steps, total = 0, len(segments) * len(windows) + sum(map(len, waiting.values()))
    hessians = dict[str, np.ndarray]()
    for segment in segments:
        wanted = {name for names in waiting for name in names}
        held: dict[str, list[np.ndarray]] = {name: [] for name in segment.wanted if name in wanted}
        for number, values in enumerate(segment, 1):
            for name, several in held.items():
                several.append(values[name])
                if number % _TOGETHER == 0 or number == len(windows):
                    rows = np.concatenate(several)
                    several.clear()
                    product = rows.T @ rows
                    hessians[name] = np.add(hessians[name], product, product) if name in hessians else product
            progress.advance(steps := steps + 1, total)
        ready = [names for names in waiting if all(name in hessians for name in names)]
        of_ready = ([hessians[name] for name in names] for names in ready)
        with one_thread_each() as pool:
            for found in pool.map(_rounded, [waiting.pop(names) for names in ready], of_ready):
                done |= found
                if finished is not None:
                    for name, matrix in found.items():
                        keep_rounded(finished, name, matrix)
                progress.advance(steps := steps + len(found), total)
        hessians = {name: hessian for name, hessian in hessians.items() if any(name in names for names in waiting)}
    return {name: done[name] for name in matmuls}


def _rounded(weights: list[MatMulWeight], hessians: list[np.ndarray]) -> dict[str, Rounded]:
    """Rounds the weights that are multiplied with the same activations, by the sum of the Hessians of these."""
    gptq, found = Gptq(np.sum(hessians, axis=0) if len(hessians) > 1 else hessians[0]), {}
    for read in weights:
        matrix = read.matrix
        try:
            found[str(read.initializer.name)] = gptq.round(matrix, choose_block_size(matrix.shape[1]))
        except ValueError as error:
            raise not_finite(read.initializer, error) from None
    return found


def rounded_to_nearest(model: ir.Model, progress: Progress = SILENT) -> dict[str, Blocks]:
    """Returns the 4-bit matrices of a float32 graph by initializer name, rounded to nearest."""
    found, matmuls = dict[str, Blocks](), _matmuls(model)
    for name, nodes in matmuls.items():
        read = matmul_weight(nodes[0])
        assert read is not None
        try:
            found[name] = round_to_nearest(read.matrix, choose_block_size(read.shape[1]))
        except ValueError as error:
            raise not_finite(read.initializer, error) from None
        progress.advance(len(found), len(matmuls))
    return found


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
