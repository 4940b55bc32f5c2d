"""Graphs in which some matrices are quantized, made one by one in the plain way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.export.quantize.calibrate.activations import probing
from pastkey.export.quantize.rounding.rewrite import quantize

Logits = npt.NDArray[np.float32]
# A tied embedding; MatMuls with a bias and a softcap; a matrix that is used twice; plain norms.
DECODERS = ["llama", "softcap_bias_and_scale", "one_block_twice", "nano_gpt"]


def logits_of(bundle: Bundle, ids: npt.NDArray[np.int64], int8: set[str] | None = None) -> Logits:
    """(T, V) of the float32 graph, or of one in which only those matrices are quantized."""
    model = ir.load(bundle.all_logits_graph)
    if int8 is not None:
        quantize(model, set(model.graph.initializers) - int8)
    with probing(model, bundle.all_logits_graph.parent, [names.LOGITS]) as probe:
        return probe(ids)[names.LOGITS]
