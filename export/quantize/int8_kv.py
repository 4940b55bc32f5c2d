"""The int8-KV graph, which decodes after a long text with keys and values cached as int8.

Attention over a long cache reads more bytes than the weights are. GroupQueryAttention accepts an int8 cache with one
scale per channel of each head: max |x| / 127 over the calibration text, with a margin. Larger values are clipped.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import first_line
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.int8_kv import INT8_KV_FROM, MIN_ONNXRUNTIME, CachePair
from pastkey.runtime.engine.caches.kv import KVCache
from pastkey.runtime.providers.ort import RunError, onnxruntime
from pastkey.values import parse_version

from ..graph.edit import CONTRIB_DOMAIN, add_weight, replace_node
from ..measure.metrics import Ids, Logits, kl_divergence
from ..measure.verify import KL_FLOOR
from ..progress import SILENT, Progress
from .calibrate.calibration import CalibrationText

_MARGIN = 1.5  # over the largest number of the calibration text: clipping costs more than coarser steps
_ALLOWED = 2  # times the KL divergence of the quantized bundle with a float32 cache
_DECODED = 64  # last tokens of a window, or half of it, that are decoded and measured: the others are prefilled
_K_SCALE = 12  # input index in GroupQueryAttention; v_scale follows


def add_int8_kv(fp32: Bundle, bundle: Bundle, text: CalibrationText, progress: Progress = SILENT) -> dict[str, float]:
    """Writes the int8-KV graph if the bundle supports one, and keeps it if decoding is not much worse with it.

    Args:
        fp32: The float32 bundle.
        bundle: Its int8 or int4 bundle, which receives the graph.
        text: Its calibration set determines the scales; its held-out set measures decoding.
        progress: Receives a warning if the graph is not kept.

    Returns:
        For the manifest's quality, {"int8_cache_kl": KL(float32 || quantized, decoded with an int8 cache)} in nats,
        mean over the decoded tokens; {} if there is no such graph.
    """
    manifest = bundle.manifest
    new = parse_version(onnxruntime.__version__) >= parse_version(MIN_ONNXRUNTIME)
    if manifest.graph != "fused" or manifest.context_length <= INT8_KV_FROM or not new:
        return {}
    _write_int8_kv_graph(bundle, text.calibration_set, progress)
    ids = text.held_out_set[0]
    prompt = ids.size - min(_DECODED, ids.size // 2)
    expected = text.predicted_by(fp32).logits(ids)[prompt:]
    plain = kl_divergence(expected, _decoded(bundle, ids, prompt, None, progress))
    try:
        cost = kl_divergence(expected, _decoded(bundle, ids, prompt, 1, progress))
    except RunError as error:  # a form of attention for which the operator has no int8 cache
        progress.warn(f"without an int8 cache for long texts, which onnxruntime refuses here: {first_line(error)}")
        cost = np.inf
    if np.isfinite(cost) and cost > _ALLOWED * max(plain, KL_FLOOR):
        progress.warn(
            f"without an int8 cache for long texts, which would cost {cost:.2g} nats where float32's costs {plain:.2g}"
        )
    if not cost <= _ALLOWED * max(plain, KL_FLOOR):
        (bundle.path / names.INT8_KV_GRAPH).unlink()
        return {}
    return {"int8_cache_kl": cost}


def _decoded(bundle: Bundle, ids: Ids, prompt: int, int8_kv_from: int | None, progress: Progress) -> Logits:
    """Returns the logits of the tokens behind the first `prompt` of `ids`, decoded one by one."""
    engine, logits = Engine(bundle, int8_kv_from=int8_kv_from), list[Logits]()
    engine.prefill(ids[:prompt])
    if int8_kv_from is not None:
        _close_float32(engine)
    for token in ids[prompt:]:
        logits.append(engine.decode(int(token)))
        progress.advance(len(logits), ids.size - prompt)
    return np.stack(logits)


def _close_float32(engine: Engine) -> None:
    """Closes the session that has prefilled, before that of the int8-KV graph opens: each holds all weights."""
    assert isinstance(engine.cache, CachePair)
    assert isinstance(engine.cache.float32, KVCache)
    engine.cache.float32.close()
    engine.graph.sessions.clear()
    engine.graph.onnx = None


def _write_int8_kv_graph(bundle: Bundle, windows: Sequence[Ids], progress: Progress) -> None:
    """Writes the graph beside the others of `bundle`, over the same weights; `windows` (T,) are calibration text.

    The graph's metadata also holds the scales, with which the runtime converts another graph's cache.
    """
    scales = _scales(bundle, windows, progress)
    model = ir.load(bundle.last_logits_graph)
    calls = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for i, call in enumerate(calls):
        keys, values = scales[2 * i], scales[2 * i + 1]
        inputs = [*call.inputs, *[None] * (_K_SCALE - len(call.inputs))]
        for what, array in (("key", keys), ("value", values)):
            inputs.append(add_weight(model, f"cache_scales.{i}.{what}", array))
        per_channel: dict[str, Any] = {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": 8,
        }
        new = ir.node(
            call.op_type,
            inputs,
            dict(call.attributes) | per_channel,
            domain=CONTRIB_DOMAIN,
            num_outputs=len(call.outputs),
            name=call.name,
        )
        replace_node(model, call, new)
        for name, array in ((names.past_key(i), keys), (names.past_value(i), values)):
            model.metadata_props[name] = base64.b64encode(array.astype("<f4").tobytes()).decode()
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if str(value.name).startswith((names.PAST_PREFIX, names.PRESENT_PREFIX)):
            value.type = ir.TensorType(ir.DataType.INT8)
    ir.save(model, bundle.path / names.INT8_KV_GRAPH)


def _scales(bundle: Bundle, windows: Sequence[Ids], progress: Progress) -> list[np.ndarray]:
    """Returns the scales of keys and values of each attention call in turn, (K * D,) float32."""
    engine = Engine(bundle)
    largest: list[np.ndarray] = []
    for number, ids in enumerate(windows, 1):
        engine.reset()
        engine.prefill(ids)
        progress.advance(number, len(windows))
        found = [np.abs(array[0]).max(1) for array in engine.cache.rows(engine.cache.length)]
        largest = found if not largest else [np.maximum(a, b) for a, b in zip(largest, found, strict=True)]
    smallest = float(np.finfo(np.float32).tiny)
    return [np.maximum(array.reshape(-1) * _MARGIN / 127, smallest).astype(np.float32) for array in largest]
