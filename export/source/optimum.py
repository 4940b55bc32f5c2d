"""The last resort for a model of transformers that cannot be given a cache: optimum's exporter, with code for each.

Its graph has our names already: standard operators, a cache that grows by concatenation. It becomes the same bundle, is
verified in the same way, and the manifest says where it came from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import nn

from pastkey import names
from pastkey.bundle import KVGeometry
from pastkey.errors import ContractError, first_line

from ..graft.huggingface import HuggingFaceDecoder
from ..graft.observe import Layer, Observation
from ..graph.simplify import simplify
from ..quiet import quiet

INSTALL = "pip install 'optimum-onnx>=0.1' 'transformers>=4.57.1,<4.58'"  # the extra "optimum"


@dataclass(frozen=True)
class OptimumExport:
    """optimum's graph, not yet clean, and what its inputs say of the cache."""

    model: ir.Model
    observation: Observation


def take_over(module: nn.Module, refused: ContractError, say: Callable[[str], None]) -> OptimumExport:
    """Runs optimum's exporter on a model of transformers that was refused.

    Raises ContractError where it is none, where optimum is not installed, and where that refuses it, too.
    """
    if not isinstance(module, HuggingFaceDecoder):
        raise refused
    if not _is_installed():
        raise ContractError(
            f"{refused}; optimum's exporter knows some models that the graft cannot take: type  {INSTALL}  "
            "and then this command again (transformers 5 gives way to 4.57: where you need it, take another "
            "virtual environment)"
        ) from refused
    say(f"the graft cannot take it ({refused}), so that optimum's exporter makes the graph")
    with quiet():
        from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(prefix="pastkey-optimum-") as temporary, module.native():
        folder, made = Path(temporary) / "model", Path(temporary) / "made"
        try:
            with quiet():
                module.model.save_pretrained(folder)
                main_export(
                    str(folder),
                    output=made,
                    task="text-generation-with-past",
                    do_validation=False,  # `verify` does it, with the runtime that ships
                    local_files_only=True,
                    device="cpu",
                )
            model = ir.load(made / "model.onnx")
            for value in model.graph.initializers.values():  # into memory, before their file goes
                if value.const_value is not None:
                    value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        except Exception as error:
            raise ContractError(f"{refused}; optimum's exporter cannot take it either: {first_line(error)}") from error
    simplify(model)
    return OptimumExport(model, _observe(model, module.model.config.num_attention_heads))


def _is_installed() -> bool:
    try:
        with quiet():
            import optimum.exporters.onnx  # noqa: F401 - whether it can be, is the question
    except ImportError:
        return False
    return True


def _observe(model: ir.Model, heads: int) -> Observation:
    """Sizes as the graph states them; a position input is added where it has none, for every loader feeds one."""
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    layers: list[Layer] = []
    while (key := inputs.get(names.past_key(len(layers)))) is not None:
        value = inputs[names.past_value(len(layers))]
        assert key.shape is not None
        assert value.shape is not None
        sizes = (key.shape[1], key.shape[3], value.shape[3])
        if not all(isinstance(size, int) for size in sizes):
            raise ContractError("optimum's graph leaves the sizes of its cache open, where numbers are needed")
        geometry = KVGeometry(*(int(str(size)) for size in sizes))
        # Its positions may count a batch's padding, and columns instead of a row's tokens.
        layers.append(Layer(geometry, heads, f"layer {len(layers)}", "optimum", padding=False))
    if names.POSITION_IDS not in inputs:
        positions = ir.Value(
            name=names.POSITION_IDS, shape=inputs[names.INPUT_IDS].shape, type=ir.TensorType(ir.DataType.INT64)
        )
        graph.inputs.append(positions)
    logits = next(value for value in graph.outputs if value.name == names.LOGITS)
    assert logits.shape is not None
    return Observation(tuple(layers), int(str(logits.shape[2])))
