"""Graphs and inputs that no export makes: each is refused by one sentence, and a cache stays unchanged.

With a library built with PASTKEY_SANITIZE (kernels/README.md), a read or write out of bounds ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx.external_data_helper import set_external_data

from pastkey.contract import names

from .conftest import each_level
from .graphs import IN_PLACE, NOTHING, Weights, arguments, attention, draw, graph, matmul, norm_matmul
from .running import Array, Case, run_at


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def without(arrays: Mapping[str, Array], name: str) -> dict[str, Array]:
    return {other: array for other, array in arrays.items() if other != name}


# --- attention --------------------------------------------------------------------------------------------------------
PLAIN, PARTED, ROTATED = draw([40], 3), draw([40], 3, packed=False), draw([40], 3, rotary=64)
ROWS, FIRST = draw([40, 9], 3), draw([3], 3)
HEADS: dict[str, Any] = {"num_heads": 6, "kv_num_heads": 2}
ROTARY: dict[str, Any] = {"do_rotary": 1}


def lengths(*values: int) -> Array:
    return np.array(values, np.int32)


def caches(array: Array) -> dict[str, Array]:
    return {"past_key": array, "past_value": array}


def tables(*shape: int) -> dict[str, Array]:
    return ROTATED | {"cos": zeros(*shape), "sin": zeros(*shape)}


# Name -> inputs, attributes and a part of the message.
ATTENTION: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "no heads": (PLAIN, {"num_heads": 0}, "num_heads is 0"),
    "heads missing": (PLAIN, {"kv_num_heads": 0}, "kv_num_heads 0"),
    "heads no multiple": (PLAIN, {"num_heads": 5}, "multiple"),
    "heads beyond 32 bits": (PLAIN, {"num_heads": 2**62, "kv_num_heads": 2}, "num_heads is 46"),
    "heads of another type": (PLAIN, {"num_heads": 6.0}, "attribute num_heads"),
    "list of heads": (PLAIN, {"num_heads": [6, 2]}, "attribute num_heads is of another type, expected an integer"),
    "list of scales": (PLAIN, {"scale": [0.5]}, "attribute scale is of another type, expected a float"),
    "later version": (PLAIN, {"version": 4}, "version is 4, expected 1 to 3"),
    "other heads": (PLAIN, {"num_heads": 12}, "query is [1, 3, 640], expected a width of 1024"),
    "other key heads": (PLAIN, {"kv_num_heads": 3}, "past_key is [1, 2, 49, 64], expected [1, 3, room"),
    "window 0": (PLAIN, {"local_window_size": 0}, "local_window_size is 0"),
    "window below -1": (PLAIN, {"local_window_size": -2}, "local_window_size is -2"),
    "scale NaN": (PLAIN, {"scale": float("nan")}, "scale is nan"),
    "soft cap below 0": (PLAIN, {"softcap": -1.0}, "softcap -1"),
    "soft cap too small": (PLAIN, {"softcap": 1e-31}, "softcap 1e-31, expected finite numbers, the second 0 or 1e-30"),
    "soft cap too large": (PLAIN, {"softcap": 3.4e38}, "softcap 3.4e+38"),
    "do_rotary 2": (ROTATED, {"do_rotary": 2}, "do_rotary is 2"),
    "smooth_softmax 3": (PLAIN, {"smooth_softmax": 3}, "smooth_softmax is 3"),
    "rotary without tables": (PLAIN, ROTARY, "do_rotary is 1, cos is missing"),
    "tables without rotary": (ROTATED, {"do_rotary": 0}, "do_rotary is 0, cos is there"),
    "sin missing": (without(ROTATED, "sin"), ROTARY, "sin is missing"),
    "cos too short": (tables(39, 32), ROTARY, "at least 40"),
    "cos too wide": (tables(40, 33), ROTARY, "1 to 32 angles"),
    "cos without angles": (tables(40, 0), ROTARY, "1 to 32"),
    "cos of rank 1": (tables(40 * 32), ROTARY, "cos is [1280]"),
    "sin of another shape": (ROTATED | {"sin": zeros(40, 31)}, ROTARY, "sin [40, 31]"),
    "query of rank 2": (PLAIN | {"query": zeros(3, 640)}, {}, "query is [3, 640], expected three dimensions"),
    "query of no rows": (PLAIN | {"query": zeros(0, 3, 640)}, {}, "at least one row"),
    "query of no tokens": (PLAIN | {"query": zeros(1, 0, 640)}, {}, "at least one row and one token"),
    "query too wide": (PLAIN | {"query": zeros(1, 3, 641)}, {}, "expected a width of 640"),
    "query of more rows": (PLAIN | {"query": zeros(2, 3, 640)}, {}, "past_key is [1, 2, 49, 64], expected [2, 2"),
    "no value": (without(PARTED, "value"), {}, "one of key and value is missing"),
    "no key": (without(PARTED, "key"), {}, "one of key and value is missing"),
    "key of fewer tokens": (PARTED | {"key": zeros(1, 2, 128)}, {}, "key is [1, 2, 128], expected [1, 3, 128]"),
    "value of another width": (PARTED | {"value": zeros(1, 3, 64)}, {}, "value is [1, 3, 64], expected [1, 3, 128]"),
    "value of rank 4": (PARTED | {"value": zeros(1, 3, 2, 64)}, {}, "value is [1, 3, 2, 64]"),
    "packed, and key and value": (PLAIN | {"key": zeros(1, 3, 128), "value": zeros(1, 3, 128)}, {}, "width of 384"),
    "cache of rank 3": (PLAIN | caches(zeros(2, 49, 64)), {}, "past_key is [2, 49, 64]"),
    "cache of more rows": (PLAIN | caches(zeros(2, 2, 49, 64)), {}, "expected [1, 2, room"),
    "cache empty": (PLAIN | caches(zeros(1, 2, 0, 64)), {}, "total_sequence_length is 40, expected 3 new tokens to 0"),
    "cache of float64": (PLAIN | caches(zeros(1, 2, 49, 64, dtype=np.float64)), {}, "past_key is of"),
    "cache of uint8": (PLAIN | caches(zeros(1, 2, 49, 68, dtype=np.uint8)), {}, "past_key is of uint8"),
    "value of less room": (PLAIN | {"past_value": PLAIN["past_value"][:, :, 1:]}, {}, "past_value is [1, 2, 48, 64]"),
    "heads of 16": (draw([40], 3, d=16), {}, "a head size of 16"),
    "heads of 40": (draw([40], 3, d=40), {}, "a head size of 40"),
    "heads of 272": (draw([40], 3, d=272), {}, "a head size of 272"),
    "total beyond room": (PLAIN | {"total_sequence_length": lengths(50)}, {}, "total_sequence_length is 50"),
    "total of fewer than new": (PLAIN | {"total_sequence_length": lengths(2)}, {}, "total_sequence_length is 2"),
    "total of two": (PLAIN | {"total_sequence_length": lengths(40, 40)}, {}, "total_sequence_length is [2]"),
    "length beyond total": (PLAIN | {"seqlens_k": lengths(40)}, {}, "seqlens_k of row 0 is 40, expected 2 to 39"),
    "length below 0": (PLAIN | {"seqlens_k": lengths(-1)}, {}, "seqlens_k of row 0 is -1"),
    "length of fewer than new": (PLAIN | {"seqlens_k": lengths(1)}, {}, "seqlens_k of row 0 is 1, expected 2 to 39"),
    "length of 2^31 - 1": (PLAIN | {"seqlens_k": lengths(2**31 - 1)}, {}, "seqlens_k of row 0 is 2147483647"),
    "length of -2^31": (PLAIN | {"seqlens_k": lengths(-(2**31))}, {}, "seqlens_k of row 0 is -2147483648"),
    "lengths of fewer rows": (ROWS | {"seqlens_k": lengths(39)}, {}, "seqlens_k is [1], expected [2]"),
    "second row's past below 0": (ROWS | {"seqlens_k": lengths(39, 1)}, {}, "seqlens_k of row 1 is 1"),
    "first prompt beyond it": (FIRST | {"seqlens_k": lengths(3)}, {}, "seqlens_k of row 0 is 3, expected 0 to 2"),
    "evicted below 0": (PLAIN | {"evicted": lengths(-1)}, {}, "evicted of row 0 is -1 of 37 earlier tokens"),
    "evicted beyond the past": (PLAIN | {"evicted": lengths(38)}, {}, "evicted of row 0 is 38 of 37 earlier tokens"),
    "evicted of a first prompt": (FIRST | {"evicted": lengths(1)}, {}, "evicted of row 0 is 1 of 0 earlier tokens"),
    "too few evicted": (
        PLAIN | {"seqlens_k": lengths(99), "total_sequence_length": lengths(100), "evicted": lengths(50)},
        {},
        "evicted of row 0 is 50 of 97 earlier tokens, expected to leave at most 49 with the new ones",
    ),
    "evicted of fewer rows": (ROWS | {"evicted": lengths(1)}, {}, "evicted is [1], expected [2]"),
    "sinks of fewer heads": (PLAIN | {"head_sink": zeros(5)}, {}, "head_sink is [5], expected [6]"),
}
OTHER = "other buffers than past_key"
MIXED = PLAIN | {"past_value": PLAIN["past_value"].astype(np.float16)}
# Name -> inputs, outputs in the buffers of inputs, and a part of the message.
ELSEWHERE: dict[str, tuple[dict[str, Array], dict[str, str], str]] = {
    "present elsewhere": (PLAIN, {"neither": "past_key"}, OTHER),
    "present_value elsewhere": (PLAIN, {"present_key": "past_key"}, OTHER),
    "present_key elsewhere": (PLAIN, {"present_value": "past_value"}, OTHER),
    "present exchanged": (PLAIN, {"present_key": "past_value", "present_value": "past_key"}, OTHER),
    "value of another type": (MIXED, {"neither": "past_key"}, "of float16 and past_key [1, 2, 49, 64] of float32"),
}

# --- products ---------------------------------------------------------------------------------------------------------
N, K = 34, 96
W = Weights.draw(N, K)
BIASED, W4, X = W.named(bias=True), Weights.draw(N, K, "int4").named(), ones(2, K)
GAMMA = {"gamma": ones(K)}
HALVES = Weights.draw(N, K, "int8 in halves").named()
GROUPED, OFFSETS = (Weights.draw(N, 512, form).named("groups") for form in ("int8", "int4 with offsets"))
FLOAT_OFFSETS = Weights.draw(N, 512, "int4 with offsets").named("float16")
ODD_OFFSETS = Weights.draw(N, K, "int8 with offsets").named("groups")  # 3 blocks


def plain(attributes: Mapping[str, Any] = NOTHING, **arrays: Array) -> bytes:
    """A MatMulInt8 with other arrays."""
    return matmul(BIASED | arrays, **attributes)


def of_inputs(inputs: list[str], arrays: Mapping[str, Array], types=NOTHING, **attributes: Any) -> bytes:
    """A MatMulInt8 of the named inputs; those of `types` are fed."""
    node = helper.make_node("MatMulInt8", ["x", *inputs], ["y"], domain="pastkey", **attributes)
    return graph([node], arrays, ["x", *types], ["y"], types)


def computed(arrays: Mapping[str, Array], name: str, **attributes: Any) -> tuple[bytes, dict[str, Array]]:
    """A MatMulInt8 one of whose weights is an input, and its feed."""
    types = {name: helper.np_dtype_to_tensor_dtype(arrays[name].dtype)}
    return of_inputs(arguments(arrays), without(arrays, name), types, **attributes), {name: arrays[name]}


def norm(arrays: Mapping[str, Array], **attributes: Any) -> bytes:
    return norm_matmul(BIASED | GAMMA | arrays, skip=True, beta="beta" in arrays, summed=True, **attributes)


# Name -> graph, inputs in addition to or instead of X, and a part of the message.
PRODUCTS: dict[str, tuple[bytes, dict[str, Array], str]] = {
    "x of rank 0": (plain(), {"x": ones()}, "X has shape [], expected [..., 96]"),
    "x too short": (plain(), {"x": X[:, :64]}, "X has shape [2, 64], expected [..., 96]"),
    "x empty along K": (plain(), {"x": X[:, :0]}, "X has shape [2, 0]"),
    "w of rank 2": (plain(w=W.codes.reshape(N, K)), {}, "W has shape [34, 96], expected [N, K / 32, 32]"),
    "w in blocks of 8": (plain(w=W.codes.reshape(N, 12, 8)), {}, "W has shape [34, 12, 8]"),
    "w of 4 bits": (matmul(W4, bits=8), {}, "W has shape [34, 3, 16], expected [N, K / 32, 32]"),
    "w of 8 bits as 4": (plain({"bits": 4}), {}, "W has shape [34, 3, 32], expected [N, K / 32, 16]"),
    "five bits": (plain({"bits": 5}), {}, "bits is 5, expected 8 or 4"),
    "zero points of 8 bits": (plain(zeros=W4["zeros"]), {}, "zero_points is given, expected only with 4 bits"),
    "too few zero points": (matmul(W4 | {"zeros": W4["zeros"][:, :1]}, bits=4), {}, "[34, 1], expected [34, 2]"),
    "zero points of float": (matmul(W4 | {"zeros": zeros(N, 3)}, bits=4), {}, "tensor(float"),
    "zero points computed": (*computed(W4, "zeros", bits=4), "zero_points is computed"),
    "w without rows": (plain(w=W.codes[:0]), {}, "W has shape [0, 3, 32]"),
    "w without blocks": (plain(w=W.codes[:, :0]), {}, "W has shape [34, 0, 32]"),
    "w of int8": (plain(w=W.codes.astype(np.int8)), {}, "tensor(int8)"),
    "w computed": (*computed(BIASED, "w"), "W is computed, expected a constant initializer"),
    "too few scales": (plain(codes=W.scale_codes[:-1]), {}, "scales has shape [33, 3], expected [34, 3]"),
    "scales of int32": (plain(codes=W.scale_codes.astype(np.int32)), {}, "scales is of int32"),
    "scales computed": (*computed(BIASED, "codes"), "scales is computed"),
    "no row scales": (of_inputs(["w", "codes"], without(W.named(), "row_scales")), {}, "row_scales is missing"),
    "row scales beside float scales": (
        of_inputs(["w", "scales", "row_scales"], W.named() | W.named("float32")), {}, "row_scales is given"
    ),
    "too few row scales": (plain(row_scales=W.row_scales[1:]), {}, "row_scales has shape [33, 1]"),
    "row scales of float64": (plain(row_scales=W.row_scales.astype(float)), {}, "tensor(double)"),
    "halves of 4 bits": (
        matmul(W4 | {"codes": HALVES["codes"]}, bits=4), {},
        "scales has shape [34, 6], expected [34, 3]: a scale for each 16 weights needs 8 bits",
    ),
    "halves with offsets": (
        matmul(HALVES | {"offsets": zeros(N, 3)}), {}, "a scale for each 16 weights needs 8 bits and no off"
    ),
    "scales of float64": (plain(codes=W.scale_codes.astype(float)), {}, "scales is of another type, expected float32"),
    "too few groups": (
        matmul(GROUPED | {"row_scales": ones(N, 1, 1)[1:]}), {},
        "row_scales has shape [33, 1, 1], expected [34, 2]",
    ),
    "groups of 3 blocks": (plain(row_scales=ones(N, 3)), {}, "row_scales has shape [34, 3], expected 34 elements"),
    "groups of 3 blocks with offsets": (
        matmul(ODD_OFFSETS), {}, "K is 96, expected a multiple of 256 with row_scales of 256 weights"
    ),
    "row scales with offsets": (
        matmul(OFFSETS | {"row_scales": W.row_scales}, bits=4), {}, "row_scales has shape [34, 1], expected [34, 2]"
    ),
    "groups beside float16 scales": (
        matmul(FLOAT_OFFSETS | {"row_scales": W.row_scales}, bits=4), {}, "row_scales is given, expected only with"
    ),
    "too few offsets": (
        matmul(OFFSETS | {"offsets": OFFSETS["offsets"][1:]}, bits=4), {}, "offsets has shape [33, 16], expected [34"
    ),
    "offsets of int8": (
        matmul(OFFSETS | {"offsets": zeros(N, 16, dtype=np.int8)}, bits=4), {}, "offsets is of int8, expected float32"
    ),
    "offsets computed": (*computed(OFFSETS, "offsets", bits=4), "offsets is computed"),
    "no offset scales": (matmul(without(OFFSETS, "offset_scales"), bits=4), {}, "offset_scales is missing"),
    "too few offset scales": (
        matmul(OFFSETS | {"offset_scales": ones(N)}, bits=4), {}, "offset_scales has shape [34], expected [34, 2]"
    ),
    "offset scales beside float16": (
        matmul(FLOAT_OFFSETS | {"offset_scales": ones(N, 2)}, bits=4), {}, "offset_scales is given, expected only with"
    ),
    "offset scales alone": (plain(offset_scales=ones(N)), {}, "offset_scales is given, expected only with offsets"),
    "zero points with offsets": (
        matmul(OFFSETS | {"zeros": zeros(N, 8, dtype=np.uint8)}, bits=4), {}, "zero_points is given, expected only with"
    ),
    "bias too long": (plain(bias=ones(N + 1)), {}, "bias has shape [35], expected 34"),
    "bias computed": (*computed(BIASED, "bias"), "bias is computed"),
    "no scales": (of_inputs(["w", ""], {"w": W.codes}), {}, ""),
    "three terms": (plain({"terms": 3}), {}, "terms is 3, expected 1 to 2"),
    "no terms": (plain({"terms": 0}), {}, "terms is 0"),
    "terms of float": (plain({"terms": 2.0}), {}, "attribute terms is of another type, expected an integer"),
    "list of terms": (plain({"terms": [2, 2]}), {}, "attribute terms is of another type, expected an integer"),
    "terms of a tensor": (plain({"terms": numpy_helper.from_array(X)}), {}, "attribute terms is of another type"),
    "later version": (plain({"version": 5}), {}, "version is 5, expected 1 to 4: a later one needs a newer"),
    "version of a text": (plain({"version": "2"}), {}, "attribute version is of another type"),
    "unknown activation": (plain({"activation": "relu"}), {}, 'activation is "relu", expected'),
    "long activation": (plain({"activation": "%s" * 10_000}), {}, "activation is"),
    "third gate": (plain({"gate": 2}), {}, "gate is 2, expected -1 to 1"),
    "odd gate": (matmul(Weights.draw(33, K).named(), gate=0), {}, "gate is 0 and W has 33 rows, expected an even"),
    "skip of another shape": (norm({}), {"skip": X[:1]}, "skip has shape [1, 96] and X [2, 96]"),
    "gamma too short": (norm({"gamma": ones(K - 1)}), {"skip": X}, "gamma has shape [95]"),
    "beta too long": (norm({"beta": ones(K + 1)}), {"skip": X}, "beta has shape [97]"),
    "unknown norm": (norm({}, norm="batch"), {"skip": X}, 'norm is "batch"'),
    "negative epsilon": (norm({}, epsilon=-1.0), {"skip": X}, "epsilon is -1"),
    "epsilon of NaN": (norm({}, epsilon=float("nan")), {"skip": X}, "epsilon is"),
}  # fmt: skip
# Name -> graph, input, and the shape of the output.
ALLOWED: dict[str, tuple[bytes, dict[str, Array], tuple[int, ...]]] = {
    "x of rank 1": (plain(), {"x": X[0]}, (N,)),
    "version of today": (plain({"version": names.NATIVE_OPERATORS}), {"x": X}, (2, N)),
    "x of rank 4": (plain(), {"x": X.reshape(1, 2, 1, K)}, (1, 2, 1, N)),
    "scales in another shape": (plain(codes=W.scale_codes.reshape(-1, 1)), {"x": X}, (2, N)),
    "no rows of many, gated": (plain({"gate": 0}), {"x": zeros(3, 0, K)}, (3, 0, N // 2)),
    "no normed rows": (norm({}), {"x": X[:0], "skip": X[:0]}, (0, N)),
    "epsilon of zero, row of zeros": (norm({}, epsilon=0.0), {"x": X * 0, "skip": X * 0}, (2, N)),
    "many rows": (plain({"gate": 1}), {"x": ones(5000, K)}, (5000, N // 2)),
}


@pytest.mark.parametrize("level", ["portable", "avx512"])  # the checks are the same for every level
def test_each_is_refused_with_a_sentence(level, run):
    cases = {
        name: (Case(attention(feed, **HEADS | attributes), [feed], 2, IN_PLACE), f"DecoderAttention: {message}")
        for name, (feed, attributes, message) in ATTENTION.items()
    }
    for name, (feed, in_place, message) in ELSEWHERE.items():
        cases[name] = Case(attention(feed, **HEADS), [feed], 1, in_place), message
    for name, (model, feed, message) in PRODUCTS.items():
        cases[name] = Case(model, [{"x": X} | feed], threads=2), message
    found = run(level, {name: case for name, (case, _) in cases.items()})
    for name, (_, message) in cases.items():
        assert found[name].error, name
        assert message.removeprefix("DecoderAttention: ") in found[name].error, (name, found[name].error)
        assert not message.startswith("DecoderAttention: ") or "DecoderAttention: " in found[name].error, name


@each_level
def test_unusual_graphs_and_inputs_run(level, run):
    found = run(level, {name: Case(model, [feed], threads=2) for name, (model, feed, _) in ALLOWED.items()})
    assert {name: outcome.error for name, outcome in found.items() if outcome.error} == {}
    for name, (_, _, shape) in ALLOWED.items():
        assert found[name].outputs[0][0].shape == shape, name


def opened(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(pytest.importorskip("pastkey_kernels").library_path())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("form", ["float32", "float16"])
def test_a_cache_at_an_odd_address_is_refused(form):
    feed = draw([40], 3, form=form)
    session = opened(attention(feed, **HEADS))
    binding, size = session.io_binding(), feed["past_key"].nbytes
    memory = np.zeros(2 * size + 66, np.uint8)
    first = -memory.ctypes.data % 64 + 1
    for name, array in feed.items():
        if name in IN_PLACE.values():
            place = memory.ctypes.data + first + size * (name == "past_value")
            where = ("cpu", 0, array.dtype, array.shape, place)
            binding.bind_input(name, *where)
            binding.bind_output(name.replace("past", "present"), *where)
        else:
            binding.bind_cpu_input(name, array)
    binding.bind_output("y")
    with pytest.raises(Exception, match="past_key begins at an address"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize("name", ["bias", "row_scales"])
def test_floats_at_an_odd_place_of_their_file_are_refused(name, tmp_path):
    """They are read where the file is mapped."""
    model, content = onnx.load_from_string(plain()), b""
    for tensor in model.graph.initializer:
        raw = numpy_helper.to_array(tensor).tobytes()
        content += bytes(-len(content) % 64 + (tensor.name == name))
        tensor.raw_data = raw
        set_external_data(tensor, "weights", len(content), len(raw))
        tensor.ClearField("raw_data")
        content += raw
    (tmp_path / "weights").write_bytes(content)
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(Exception, match=f"MatMulInt8: {name} begins at an address.* that is no multiple of 4"):
        opened(tmp_path / "graph.onnx")


def test_a_level_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(
        AssertionError, match="PASTKEY_KERNELS is avx1024, and this machine and this build have portable"
    ):
        run_at("avx1024", [Case(plain(), [{"x": X}])], tmp_path)
