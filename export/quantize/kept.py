"""A quantized source as it is: its blocks move into the bundle without rounding, and its floats stay floats.

Blocks that the target does not multiply by, and numbers in a form that cannot be kept, are rounded to int8. The bundle
is measured twice: its kept blocks without rounded activations, which must give the source's logits, and as it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import onnx_ir as ir

from pastkey.contract.bundle import Bundle
from pastkey.errors import ParityError
from pastkey.files.memory import give_back_memory
from pastkey.providers import TARGETS, Form

from ..graph.blocks import Blocks
from ..graph.write.save import write_graphs
from ..measure.metrics import kl_divergence
from ..progress import Progress
from ..settings import ExportConfig
from ..source.packed.file_matrix import FileMatrix
from .calibrate.calibration import CalibrationText, measured
from .exact import exact_engine
from .rounding.kept import SourceFile
from .rounding.lattice import lattice_of
from .rounding.matrices import MatMulWeight, embedding_weight, matmul_weight
from .rounding.rewrite import quantize
from .search import Quantized, Write

_LARGEST_KL = 1e-6  # nats: two orders of adding the same products


def make_kept(
    matrices: Sequence[FileMatrix],
    fp32: Bundle,
    text: CalibrationText,
    write: Write,
    config: ExportConfig,
    progress: Progress,
) -> Quantized:
    """Keeps, writes and measures. `matrices` are those of the source's file, none of a float source on a lattice.

    Raises ParityError if kept weights give other logits than the source.
    """
    progress.stage("round nothing: find the blocks of the source's file")
    model, target = ir.load(fp32.all_logits_graph), TARGETS[config.target]
    file, blocks, told, floats = SourceFile(matrices), dict[str, Blocks](), dict[str, list[str]](), set[str]()
    read = _matrices(model)
    for done, (name, (weight, gathered)) in enumerate(read.items()):
        found = file.find(weight.matrix) if matrices else lattice_of(weight.matrix)
        if found is None and matrices:
            floats.add(name)
            what = "float32: no quantized matrix of the source has these numbers"
        elif found is None:
            what = "int8, rounded: its numbers are not on a lattice"
        elif found.blocks is None:
            what = f"int8, rounded: {found.form} has no integers that are multiplied as they are"
        elif found.blocks.offsets is not None and not target.block_sums:
            what = f"int8, rounded: {config.target} does not multiply by {found.form}, whose blocks have offsets"
        elif gathered and (found.blocks.zeros is not None or found.blocks.order is not None):
            what = f"int8, rounded: a table of {found.form} with its own zero points cannot be gathered"
        else:
            blocks[name] = found.blocks
            what = f"{found.form}, kept"
        told.setdefault(what, []).append(name)
        progress.advance(done + 1, len(read))
    quantize(model, floats, blocks=blocks, form=target.form)
    bundle, weight_bytes = write(model)
    quality = measured(fp32, bundle, text, progress)
    with _without_rounded(fp32, bundle, blocks, read.keys() - blocks.keys(), target.form) as proved:
        divergence = _divergence(fp32, proved, text)
    if matrices and not divergence <= _LARGEST_KL:
        raise ParityError(
            f"the weights kept from the source's file give other logits than the source: a KL divergence of "
            f"{divergence:.2g} nats, at most {_LARGEST_KL:g}; please report it, and export with --precision int8"
        )
    return Quantized(bundle, weight_bytes, quality | {"weights": told, "kl_divergence_of_weights": divergence}, None)


def _matrices(model: ir.Model) -> dict[str, tuple[MatMulWeight, bool]]:
    """Returns the matrices that the graph reads by the names of their initializers, and whether rows are gathered."""
    found: dict[str, tuple[MatMulWeight, bool]] = {}
    for node in model.graph:
        table, weight = embedding_weight(node), matmul_weight(node)
        if table is not None:
            found[str(table.name)] = MatMulWeight(table, transposed=False), True
        elif weight is not None:
            found.setdefault(str(weight.initializer.name), (weight, False))
    return found


@contextlib.contextmanager
def _without_rounded(
    fp32: Bundle, bundle: Bundle, blocks: Mapping[str, Blocks], others: Set[str], form: Form
) -> Iterator[Bundle]:
    """Yields a bundle of only the kept blocks, with all other matrices in float32."""
    if not others:
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="kept-", dir=fp32.path) as folder:
        model = ir.load(fp32.all_logits_graph)
        quantize(model, others, blocks=blocks, form=form)
        write_graphs(model, Path(folder), bundle.manifest.precision)
        yield Bundle(Path(folder), dataclasses.replace(bundle.manifest, hidden_size=None))


def _divergence(fp32: Bundle, bundle: Bundle, text: CalibrationText) -> float:
    """The largest KL divergence from float32 in nats on a held-out window, if activations are not rounded."""
    reference, found = text.predicted_by(fp32), list[float]()
    give_back_memory()
    with exact_engine(bundle) as engine:
        for ids in text.held_out_set:
            engine.reset()
            found.append(kl_divergence(reference.logits(ids), engine.all_logits(ids)))
    return max(found)
