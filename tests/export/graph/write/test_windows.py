"""The graph that lets rows behind windows go: which calls have other lengths, and their results."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.export.graph.write.native import to_native
from pastkey.export.graph.write.windows import POSITION_IDS, evict_behind_windows

from ...small_graphs import model_of, run_model

SIZE, ROOM, CONTEXT = 32, 20, 40
WINDOWS = (-1, 4, 3, CONTEXT)
RNG = np.random.default_rng(0)
ANGLES = np.arange(CONTEXT)[:, None] / 100 ** (np.arange(SIZE // 2) / (SIZE // 2))
TABLES = {"cos": np.cos(ANGLES).astype(np.float32), "sin": np.sin(ANGLES).astype(np.float32)}
PAST = [f"past_key_values.{i}.{kind}" for i in range(len(WINDOWS)) for kind in ("key", "value")]


def decoder() -> ir.Model:
    """Attention calls over one query, of which the second and the third have a window; the third does not rotate."""
    body = "x0 = Identity(x)\n"
    for i, window in enumerate(WINDOWS):
        rotated, tables = ("do_rotary = 1, ", ", cos, sin") if i != 2 else ("", "")
        body += f"""x{i + 1}, "present.{i}.key", "present.{i}.value" = com.microsoft.GroupQueryAttention
            <{rotated}num_heads = 1, kv_num_heads = 1, local_window_size = {window}>
            (x{i}, x{i}, x{i}, "{PAST[2 * i]}", "{PAST[2 * i + 1]}", seqlens_k, total_sequence_length{tables})\n"""
    caches = ", ".join(f'float[b, 1, p, {SIZE}] "{name}"' for name in PAST)
    present = ", ".join(f'float[b, 1, r, {SIZE}] "{names.present_of(name)}"' for name in PAST)
    return model_of(
        f"""g (int64[b, t] input_ids, int64[b, t] position_ids, float[b, t, {SIZE}] x, int32[b] seqlens_k,
        int32 total_sequence_length, {caches}, float[{CONTEXT}, {SIZE // 2}] cos, float[{CONTEXT}, {SIZE // 2}] sin)
        => (float[b, t, {SIZE}] logits, {present}) {{ {body} logits = Identity(x{len(WINDOWS)}) }}""",
        **TABLES,
    )


def run(model: ir.Model, total: int, gone: int, x: np.ndarray, past: list[np.ndarray]) -> list[np.ndarray]:
    feeds = {"input_ids": np.zeros((1, 1), np.int64), "position_ids": np.array([[total - 1]]), "x": x}
    feeds |= {"seqlens_k": np.array([total - 1], np.int32), "total_sequence_length": np.array(total, np.int32)}
    feeds |= {"evicted": np.array([gone], np.int32)} | dict(zip(PAST, past, strict=True))
    return run_model(model, **feeds)


def test_calls_with_a_window_take_the_rows_that_are_left():
    plain, model, total = decoder(), decoder(), 18
    evict_behind_windows(model, CONTEXT)
    calls = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    turned = [len(call.inputs) > POSITION_IDS and call.inputs[POSITION_IDS] is not None for call in calls]
    assert turned == [False, True, False, False]
    x = RNG.normal(size=(1, 1, SIZE)).astype(np.float32)
    past = [RNG.normal(size=(1, 1, ROOM, SIZE)).astype(np.float32) for _ in PAST]
    expected = run(plain, total, 0, x, past)[0]
    for gone in (0, 5, total - 4):  # at most what the wider window does not see
        left = [array[:, :, gone:] if place // 2 in (1, 2) else array for place, array in enumerate(past)]
        np.testing.assert_allclose(run(model, total, gone, x, left)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("context", [CONTEXT, 3])
def test_a_window_as_wide_as_the_context_is_none(context):
    model = decoder()
    evict_behind_windows(model, context)
    assert (names.EVICTED in {value.name for value in model.graph.inputs}) == (context == CONTEXT)


def test_the_native_kernel_takes_all_tokens_and_those_that_are_gone():
    model = decoder()
    evict_behind_windows(model, CONTEXT)
    assert to_native(model)
    calls = [[None if value is None else value.name for value in node.inputs] for node in model.graph
             if node.op_type == "DecoderAttention"]  # fmt: skip
    assert [call[5:7] for call in calls] == [[names.SEQLENS_K, names.TOTAL_SEQUENCE_LENGTH]] * len(WINDOWS)
    assert [names.EVICTED in call for call in calls] == [False, True, True, False]
    assert not {"Sub", "ReduceMax", "Max"} & {node.op_type for node in model.graph}
