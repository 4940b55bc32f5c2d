"""The bundles of the conformance suite: one row each, with its abilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..export.decoders import Hybrid, Plain, Windowed, gpt2, llama
from ..export.graft.own.registry import DECODERS

CONTEXT = 40


def in_contract(module: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = module(ids, torch.arange(ids.shape[1])[None])
    return logits


@dataclass(frozen=True)
class Row:
    """A bundle, and the kernels that run it.

    `lacks` names behaviours that do not apply, each with its reason.
    """

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor] = in_contract  # as its author runs it: (B, T) -> (B, T, V)
    precision: str = "fp32"
    graph: str = "fused"  # that it gets
    options: dict[str, Any] = field(default_factory=dict)  # further ones of the export
    context: int = CONTEXT
    native: bool = False
    lacks: dict[str, str] = field(default_factory=dict)

    @property
    def limits(self) -> tuple[float, float]:
        """Max |difference| over max |logit|: of one run from torch, and of every path from one run."""
        if self.precision == "int8" and self.graph == "static":
            return 0.2, 0.01  # activations are rounded by scales that are fixed
        return {"fp32": (1e-5, 1e-5), "fp16": (2e-3, 2e-3), "int8": (0.08, 0.01), "int4": (0.25, 0.01)}[self.precision]


NO_SHIFT = {"shift": "its positions are learned"}
ONE_ROW = {"batch": "static graphs have one row", "padding": "static graphs have one row"}
NATIVE = {
    "plain": "other programs run the graph of onnxruntime's kernels",
    "padding": "the native graph gives the logits of the last position alone",
}
STATES = {
    "trim": "a short convolution keeps the rows of its last tokens alone",
    "padding": "a padded row would be read by the short convolution",
    **NO_SHIFT,
}
HYBRID = {
    "trim": "a state is there for some lengths alone",
    "padding": "a padded row would change the state",
    **NO_SHIFT,
}
STATIC = {**ONE_ROW, "plain": "other programs feed it masks; tests/export/graph/static runs its graphs"}


def own(name: str, **changes: Any) -> Row:
    decoder = DECODERS[name]
    return Row(decoder.make, decoder.call, context=decoder.context, **changes)


def hybrid() -> nn.Module:
    return Hybrid(width=64, kv_heads=2, size=32)


def windowed() -> nn.Module:
    return Windowed(width=64, kv_heads=2, size=32, layers=2, context=64)


ROWS = {
    "llama-fp32": Row(llama, options={"generate": True, "hidden_states": True}),
    "llama-fp32-standard": Row(llama, graph="standard", options={"graph": "standard", "format": "ort"}),
    "llama-fp32-static": Row(llama, graph="static", options={"graph": "static", "chunk": 7}, lacks=STATIC),
    "llama-fp16": Row(llama, precision="fp16", options={"generate": True}),
    "llama-int8": Row(llama, precision="int8"),
    "llama-int8-native": Row(llama, precision="int8", native=True, lacks=NATIVE),
    "llama-int8-generate": Row(llama, precision="int8", options={"generate": True, "hidden_states": True}),
    "llama-int8-portable": Row(
        llama, precision="int8", graph="standard", options={"target": "portable", "format": "ort", "generate": True}
    ),
    "llama-int8-static": Row(llama, precision="int8", graph="static", options={"target": "qnn"}, lacks=STATIC),
    "llama-int4": Row(llama, precision="int4", options={"generate": True}),
    "llama-int4-native": Row(llama, precision="int4", native=True, lacks=NATIVE),
    "gpt2-fp32": Row(gpt2, options={"generate": True, "format": "ort"}, lacks=NO_SHIFT),
    "gpt2-fp32-standard": Row(gpt2, graph="standard", options={"graph": "standard", "generate": True}, lacks=NO_SHIFT),
    "gpt2-fp32-static": Row(
        gpt2, graph="static", options={"graph": "static", "chunk": 16}, lacks=STATIC | NO_SHIFT
    ),
    "gpt2-fp16": Row(gpt2, precision="fp16", lacks=NO_SHIFT),
    "gpt2-int8": Row(gpt2, precision="int8", lacks=NO_SHIFT),
    "gpt2-int8-native": Row(gpt2, precision="int8", native=True, lacks=NATIVE | NO_SHIFT),
    "gpt2-int4": Row(gpt2, precision="int4", lacks=NO_SHIFT),
    "gpt2-int4-native": Row(gpt2, precision="int4", native=True, lacks=NATIVE | NO_SHIFT),
    "own-fp32": own("tril_buffer", lacks=NO_SHIFT),
    "own-int8": own("tril_buffer", precision="int8", lacks=NO_SHIFT),
    "latent-fp32": own("latent", graph="standard"),
    "latent-int8": own("latent", graph="standard", precision="int8"),
    "convolution-fp32": own("short_conv", graph="standard", options={"generate": True}, lacks=STATES),
    "convolution-int8": own("short_conv", graph="standard", precision="int8", lacks=STATES),
    "hybrid-fp32": Row(hybrid, options={"generate": True, "hidden_states": True}, lacks=HYBRID),
    "hybrid-fp32-standard": Row(hybrid, graph="standard", options={"graph": "standard"}, lacks=HYBRID),
    "hybrid-fp16": Row(hybrid, precision="fp16", lacks=HYBRID),
    "hybrid-int8": Row(hybrid, precision="int8", lacks=HYBRID),
    "hybrid-int8-native": Row(hybrid, precision="int8", native=True, lacks=HYBRID | NATIVE),
    "hybrid-int4": Row(hybrid, precision="int4", lacks=HYBRID),
    "hybrid-int4-native": Row(hybrid, precision="int4", native=True, lacks=HYBRID | NATIVE),
    "window-fp32": Row(windowed, context=64, options={"generate": True}),
    "window-fp32-standard": Row(windowed, context=64, graph="standard", options={"graph": "standard"}),
    "window-fp16": Row(windowed, context=64, precision="fp16"),
    "window-int8": Row(windowed, context=64, precision="int8"),
    "window-int8-native": Row(windowed, context=64, precision="int8", native=True, lacks=NATIVE),
    "window-int4": Row(windowed, context=64, precision="int4"),
    "window-int4-native": Row(windowed, context=64, precision="int4", native=True, lacks=NATIVE),
    "uneven-fp32": Row(
        lambda: Plain(value_size=16, layers=2), graph="standard", options={"generate": True}, lacks=NO_SHIFT
    ),
}  # fmt: skip
# Each export traces a decoder, or shares the trace of one with the same graph.
QUICK = (
    "llama-fp32",
    "llama-int8",
    "llama-int8-native",
    "gpt2-fp32-standard",
    "convolution-fp32",
    "hybrid-fp32",
    "window-fp32",
)
CI = (
    "llama-fp32-standard", "llama-fp32-static", "llama-fp16", "llama-int8-generate", "llama-int8-portable",
    "llama-int4", "llama-int4-native", "gpt2-fp32", "gpt2-int8", "gpt2-int4-native", "own-fp32",
    "uneven-fp32", "hybrid-int8-native", "window-int8-native",
)  # fmt: skip
