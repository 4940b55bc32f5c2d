"""Activations on text, for whatever is chosen by them: the scales that are migrated into weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.runtime import Generation, SamplingConfig, Session
from pastkey.runtime.ort import onnxruntime

from .migrate import find_groups, migrate

TOKENS = 256  # length of the text, where the context has room for it
_ROWS = 128  # of each activation, spread over the text


def calibrate(model: ir.Model, bundle: Bundle) -> None:
    """Migrates scales in `model`, the float32 graph of `bundle`, by the activations on a text of the model's own."""
    groups = find_groups(model)
    if groups:
        samples = activations(bundle.common_graph, [group.activation for group in groups], own_text(bundle))
        migrate(model, groups, samples)


def own_text(bundle: Bundle) -> list[int]:
    """What the model itself writes from its begin token on: text of its kind, without asking anybody for some."""
    manifest = bundle.manifest
    session = Session(bundle)
    sampling = SamplingConfig(temperature=1.0, seed=0)
    starts = [token for token in (manifest.bos_token_id, *manifest.eos_token_ids) if token is not None]
    start = min(starts[0] if starts else 0, manifest.vocab_size - 1)
    return [
        start,
        *Generation(session, [start], max_new_tokens=min(TOKENS, manifest.context_length) - 1, sampling=sampling),
    ]


def activations(graph: Path, wanted: Sequence[str], ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Rows (N, K) float32 of each wanted value of the graph, run on `ids` without a past."""
    model = ir.load(graph)
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in wanted:
        made[name].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(made[name])
    probe = graph.with_name("calibration.onnx")  # beside the weights, which it reads
    ir.save(model, probe)
    try:
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
        probe.unlink()
    chosen = np.linspace(0, length - 1, min(_ROWS, length)).astype(int)
    return {name: rows.reshape(-1, rows.shape[-1])[chosen] for name, rows in zip(wanted, found, strict=True)}
