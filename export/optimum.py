"""What the graft cannot take (ALiBi, attention by hand) through optimum's exporter, which has code per architecture.

Its graph has our names already: standard operators, a cache that grows by concatenation. It becomes the same bundle, is
verified in the same way, and the manifest says where it came from.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from pastkey import names
from pastkey.bundle import KVGeometry
from pastkey.errors import ContractError, first_line

from .huggingface import NATIVE
from .observe import Layer, Observation
from .quiet import quiet
from .simplify import simplify

INSTALL = "pip install 'pastkey[cpu,export,optimum]'"


class NativeDecoder(nn.Module):
    """The transformers model as it is, which makes its positions itself: what optimum's graph is compared with."""

    def __init__(self, decoder: nn.Module) -> None:
        """`decoder` is a HuggingFaceDecoder, whose model is taken over."""
        super().__init__()
        model: Any = decoder.model
        self.model = model
        self.shown_name = type(model).__name__
        with quiet():  # transformers has advice about it
            model.set_attn_implementation(NATIVE)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)."""
        logits: Tensor = self.model(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
        return logits


@dataclass(frozen=True)
class OptimumExport:
    """optimum's graph, not yet clean, and what its inputs say of the cache."""

    model: ir.Model
    observation: Observation


def is_installed() -> bool:
    """Whether optimum's exporter can be imported here."""
    try:
        with quiet():
            import optimum.exporters.onnx  # noqa: F401 - whether it can be, is the question
    except ImportError:
        return False
    return True


def export_with_optimum(folder: Path, module: NativeDecoder) -> OptimumExport:
    """Runs optimum's exporter on a Hugging Face folder. Raises ContractError where it refuses the model, too."""
    with quiet():
        from optimum.exporters.onnx import main_export

    with tempfile.TemporaryDirectory(prefix="pastkey-optimum-") as temporary:
        try:
            with quiet():
                main_export(
                    str(folder),
                    output=temporary,
                    task="text-generation-with-past",
                    do_validation=False,  # `verify` does it, with the runtime that ships
                    local_files_only=True,
                    device="cpu",
                )
            model = ir.load(Path(temporary) / "model.onnx")
            for value in model.graph.initializers.values():  # into memory, before their file goes
                if value.const_value is not None:
                    value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
        except Exception as error:
            raise ContractError(f"optimum's exporter cannot take {folder} either: {first_line(error)}") from error
    simplify(model)
    return OptimumExport(model, _observe(model, module.model.config.num_attention_heads))


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
        layers.append(Layer(geometry, heads, f"layer {len(layers)}", "optimum"))
    if names.POSITION_IDS not in inputs:
        positions = ir.Value(
            name=names.POSITION_IDS, shape=inputs[names.INPUT_IDS].shape, type=ir.TensorType(ir.DataType.INT64)
        )
        graph.inputs.append(positions)
    logits = next(value for value in graph.outputs if value.name == names.LOGITS)
    assert logits.shape is not None
    return Observation(tuple(layers), int(str(logits.shape[2])))
