"""Activations on text, for whatever is chosen by them: the scales that are migrated into weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey import names
from pastkey.bundle import Bundle, Manifest
from pastkey.runtime import Session
from pastkey.runtime.ort import onnxruntime

from .evaluate import own_text, relative_difference
from .migrate import find_groups, migrate

TOKENS = 256  # length of the text, where the context has room for it
# Of the largest logit. Moving a scale rounds every weight anew, by 6e-8; a wrong fold changes everything.
_MAX_CHANGE = 1e-4
_ROWS = 128  # of each activation, spread over the text


def calibrated(bundle: Bundle) -> ir.Model:
    """The float32 graph of `bundle` with scales migrated by the activations on a text of the model's own.

    It is run against the graph as it was: should the logits change, for a form of graph that nobody thought of, then
    that one is returned.
    """
    model = ir.load(bundle.common_graph)
    groups = find_groups(model)
    if not groups:
        return model
    manifest = bundle.manifest
    ids = own_text(Session(bundle), [begin_token(manifest)], min(TOKENS, manifest.context_length))
    folder = bundle.common_graph.parent
    before = run(model, folder, [names.LOGITS, *(group.activation for group in groups)], ids)
    chosen = np.linspace(0, len(ids) - 1, min(_ROWS, len(ids))).astype(int)
    migrate(model, groups, {group.activation: before[group.activation][chosen] for group in groups})
    after = run(model, folder, [names.LOGITS], ids)
    if relative_difference(before[names.LOGITS], after[names.LOGITS]) > _MAX_CHANGE:
        return ir.load(bundle.common_graph)
    return model


def begin_token(manifest: Manifest) -> int:
    """What a text of the model's begins with, or else the end token, or else the first of all."""
    known = [token for token in (manifest.bos_token_id, *manifest.eos_token_ids) if token is not None]
    return min(known[0] if known else 0, manifest.vocab_size - 1)


def run(model: ir.Model, folder: Path, wanted: Sequence[str], ids: Sequence[int]) -> dict[str, np.ndarray]:
    """The rows (T, K) float32 of each wanted value of the graph, run on `ids` without a past.

    `folder` holds the weights file that the graph names; where some were changed since, all are written anew meanwhile.
    """
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    ends = list(model.graph.outputs)
    extra = [made[name] for name in wanted if made[name] not in ends]
    for value in extra:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.extend(extra)
    probe, data = folder / "probe.onnx", "probe.onnx_data"
    try:
        changed = any(_is_large_and_in_memory(value) for value in model.graph.initializers.values())
        ir.save(model, probe, external_data=data if changed else None)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        past = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in session.get_inputs()
            if value.name not in (names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS)
        }
        length = len(ids)
        feeds = {
            names.INPUT_IDS: np.array([ids], np.int64),
            names.ATTENTION_MASK: np.ones((1, length), np.int64),
            names.POSITION_IDS: np.arange(length)[None],
        }
        found = session.run(list(wanted), feeds | past)
    finally:
        model.graph.outputs[:] = ends
        for value in extra:
            value.type = None
        probe.unlink(missing_ok=True)
        (folder / data).unlink(missing_ok=True)
    return {name: rows.reshape(-1, rows.shape[-1]) for name, rows in zip(wanted, found, strict=True)}


def _is_large_and_in_memory(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= 1 << 10
