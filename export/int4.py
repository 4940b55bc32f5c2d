"""int4 from a verified float32 bundle: 4 bits for most of what products read, 8 where a bit buys most.

1. every matrix but embeddings and the output head is rounded to 4 bits by GPTQ (`gptq`), on text
2. what each costs is measured, all others in float32 (`sensitivity`)
3. one weight in 32, those of the matrices that cost most per weight, are int8 instead; for `--max-kl` more

Scales are not migrated as for int8: that makes activations easier to round and weights harder, which 4 bits need most.

Embeddings and the output head are int8 as they are there: in a small model they are a quarter of all weights, and cost
as much in 4 bits as all others together.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError

from .blocks import choose_block_size
from .budget import Progress, Quantized, Write, written
from .calibrate import CalibrationText, probing
from .evaluate import Ids
from .gptq import FourBit, round_by_hessian
from .graph import weight
from .last_position import output_head
from .quantize import constant_factor, gathered_table, quantize
from .sensitivity import Sensitivity, missed, sensitivity

WINDOWS = 32  # of calibration text: a Hessian is more numbers than the scales that int8 is calibrated by
_PROBED = 1  # window that shows what each matrix costs
_INT8_SHARE = 1 / 32  # of the weights that may be 4-bit


def make_int4(exact: Bundle, text: CalibrationText, write: Write, say: Progress, *, max_kl: float | None) -> Quantized:
    """Rounds, writes and measures; with `max_kl`, again and again until the budget is met.

    As `make_int8`, but what costs too much goes to int8 and not to float32. Raises InputError on NaN or infinity, and
    QualityError where the budget is missed with every product in int8.
    """
    graph = exact.common_graph
    say("round products to 4 bits, each column making good what the ones before it cost")
    int4 = rounded(ir.load(graph), graph.parent, text.chosen_by)
    say("measure what each matrix costs in int4")
    table = sensitivity(ir.load(graph), graph.parent, text.chosen_by[:_PROBED], max_kl, int4=int4)
    raised = max(in_int8(table), len(table.keep))
    step = 1
    while True:
        in_8_bits = [name for name in table.worst(raised) if name in int4]
        model = ir.load(graph)
        quantize(model, int4={name: matrix for name, matrix in int4.items() if name not in in_8_bits})
        bundle, weight_bytes, quality = written(exact, model, write, text)
        kl = quality["kl_divergence"]
        if max_kl is None or kl <= max_kl:
            return Quantized(bundle, weight_bytes, quality | {"int8_weights": in_8_bits}, table)
        if raised >= len(table.ranking):
            raise missed(kl, max_kl, "int4", "with every product in int8")
        raised, step = min(raised + step, len(table.ranking)), 2 * step
        shutil.rmtree(bundle.common_graph.parent)


def in_int8(table: Sensitivity) -> int:
    """How many of the first in the table's ranking are int8 in any case: as many as keep within their share."""
    sizes = {row.weight: float(np.prod(row.shape)) for row in table.rows}
    filled = np.cumsum([sizes[name] for name in table.ranking])
    return int((filled <= _INT8_SHARE * filled[-1]).sum()) if len(filled) else 0


def rounded(model: ir.Model, folder: Path, windows: Sequence[Ids]) -> dict[str, FourBit]:
    """The 4-bit matrices of a float32 graph, by the names of their initializers, from windows (T,) of token ids.

    `folder` holds the weights file that the graph names.
    """
    products = _products(model)
    if not products:
        return {}
    wanted = list(dict.fromkeys(_activation(node) for nodes in products.values() for node in nodes))
    with probing(model, folder, wanted) as probe:
        hessians = {name: np.zeros((0, 0), np.float32) for name in wanted}
        for ids in windows:
            for name, rows in probe(ids).items():
                square = rows.T @ rows
                hessians[name] = square if hessians[name].size == 0 else hessians[name] + square
    with _one_thread_each() as pool:
        found = pool.map(lambda nodes: _rounded(nodes, hessians), products.values())
        return dict(zip(products, found, strict=True))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool for torch's work on matrices: where threads share each of many small steps, they wait for one another."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _rounded(nodes: list[ir.Node], hessians: dict[str, np.ndarray]) -> FourBit:
    found = constant_factor(nodes[0])
    assert found is not None
    array = weight(found[0])
    assert array is not None
    matrix = array.T if found[1] else array
    try:
        hessian = np.sum([hessians[_activation(node)] for node in nodes], axis=0)
        return round_by_hessian(matrix, hessian, choose_block_size(matrix.shape[1]))
    except ValueError as error:
        raise InputError(
            f"the weight {found[0].name} holds {error}, which cannot be quantized: training went wrong"
        ) from None


def _activation(product: ir.Node) -> str:
    """The name of what it reads."""
    assert product.inputs[0] is not None
    return str(product.inputs[0].name)


def _products(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The products that may be 4-bit, by the initializer that they read: all but the head and whatever is gathered."""
    head = next((output_head(value) for value in model.graph.outputs if value.name == names.LOGITS), None)
    tables = {table.name for node in model.graph if (table := gathered_table(node)) is not None}
    found: dict[str, list[ir.Node]] = {}
    excluded = set(tables)
    for node in model.graph:
        factor = constant_factor(node)
        if factor is None:
            continue
        if node is head or node.inputs[0] is None or node.inputs[0].producer() is None:
            excluded.add(factor[0].name)
        else:
            found.setdefault(str(factor[0].name), []).append(node)
    return {name: nodes for name, nodes in found.items() if name not in excluded}
