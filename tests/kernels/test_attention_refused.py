"""Graphs and inputs that no export makes: DecoderAttention refuses each by one sentence and leaves the cache alone.

With a library built with PASTKEY_SANITIZE (kernels/README.md), a read or write out of bounds ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest

from .attention_graphs import IN_PLACE, attention, draw
from .running import Array, Case, run_at

PLAIN = draw([40], 3)
PARTED = draw([40], 3, packed=False)
ROTATED = draw([40], 3, rotary=64)
ROWS = draw([40, 9], 3)
FIRST = draw([3], 3)
HEADS: dict[str, Any] = {"num_heads": 6, "kv_num_heads": 2}


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


def lengths(*values: int) -> Array:
    return np.array(values, np.int32)


def without(feed: Mapping[str, Array], *names: str) -> dict[str, Array]:
    return {name: array for name, array in feed.items() if name not in names}


def caches(array: Array) -> dict[str, Array]:
    return {"past_key": array, "past_value": array}


# Name -> inputs, attributes and a part of the message.
REFUSED: dict[str, tuple[dict[str, Array], dict[str, Any], str]] = {
    "no heads": (PLAIN, {"num_heads": 0}, "num_heads is 0"),
    "heads missing": (PLAIN, {"kv_num_heads": 0}, "kv_num_heads 0"),
    "heads below 0": (PLAIN, {"num_heads": -6, "kv_num_heads": -2}, "num_heads is -6"),
    "heads no multiple": (PLAIN, {"num_heads": 5}, "multiple"),
    "heads beyond 32 bits": (PLAIN, {"num_heads": 2**62, "kv_num_heads": 2}, "num_heads is 46"),
    "heads of another type": (PLAIN, {"num_heads": 6.0}, "attribute num_heads"),
    "list of heads": (PLAIN, {"num_heads": [6, 2]}, "attribute num_heads is of another type, expected an integer"),
    "list of scales": (PLAIN, {"scale": [0.5]}, "attribute scale is of another type, expected a float"),
    "list of flags": (ROTATED, {"do_rotary": 1, "rotary_interleaved": [1, 1]}, "attribute rotary_interleaved is of"),
    "later version": (PLAIN, {"version": 3}, "version is 3, expected 1 to 2"),
    "other heads": (PLAIN, {"num_heads": 12}, "query is [1, 3, 640], expected a width of 1024"),
    "other key heads": (PLAIN, {"kv_num_heads": 3}, "past_key is [1, 2, 49, 64], expected [1, 3, room"),
    "window 0": (PLAIN, {"local_window_size": 0}, "local_window_size is 0"),
    "window below -1": (PLAIN, {"local_window_size": -2}, "local_window_size is -2"),
    "scale NaN": (PLAIN, {"scale": float("nan")}, "scale is nan"),
    "soft cap below 0": (PLAIN, {"softcap": -1.0}, "softcap -1"),
    "soft cap too small": (PLAIN, {"softcap": 1e-31}, "softcap 1e-31, expected finite numbers, the second 0 or 1e-30"),
    "soft cap too large": (PLAIN, {"softcap": 3.4e38}, "softcap 3.4e+38"),
    "soft cap infinite": (PLAIN, {"softcap": float("inf")}, "softcap inf"),
    "do_rotary 2": (ROTATED, {"do_rotary": 2}, "do_rotary is 2"),
    "smooth_softmax 3": (PLAIN, {"smooth_softmax": 3}, "smooth_softmax is 3"),
    "rotary without tables": (PLAIN, {"do_rotary": 1}, "do_rotary is 1, cos is missing"),
    "tables without rotary": (ROTATED, {"do_rotary": 0}, "do_rotary is 0, cos is there"),
    "sin missing": (without(ROTATED, "sin"), {"do_rotary": 1}, "sin is missing"),
    "cos too short": (ROTATED | {"cos": zeros(39, 32), "sin": zeros(39, 32)}, {"do_rotary": 1}, "at least 40"),
    "cos too wide": (ROTATED | {"cos": zeros(40, 33), "sin": zeros(40, 33)}, {"do_rotary": 1}, "1 to 32 angles"),
    "cos without angles": (ROTATED | {"cos": zeros(40, 0), "sin": zeros(40, 0)}, {"do_rotary": 1}, "1 to 32"),
    "cos of rank 1": (ROTATED | {"cos": zeros(40 * 32), "sin": zeros(40 * 32)}, {"do_rotary": 1}, "cos is [1280]"),
    "sin of another shape": (ROTATED | {"sin": zeros(40, 31)}, {"do_rotary": 1}, "sin [40, 31]"),
    "query of rank 2": (PLAIN | {"query": zeros(3, 640)}, {}, "query is [3, 640], expected three dimensions"),
    "query of no rows": (PLAIN | {"query": zeros(0, 3, 640)}, {}, "at least one row"),
    "query of no tokens": (PLAIN | {"query": zeros(1, 0, 640)}, {}, "at least one row and one token"),
    "query of no width": (PLAIN | {"query": zeros(1, 3, 0)}, {}, "expected a width of 640"),
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
    "cache of no width": (PLAIN | caches(zeros(1, 2, 49, 0)), {}, "a head size of 0"),
    "cache of float64": (PLAIN | caches(zeros(1, 2, 49, 64, dtype=np.float64)), {}, "past_key is of"),
    "cache of uint8": (PLAIN | caches(zeros(1, 2, 49, 68, dtype=np.uint8)), {}, "past_key is of uint8"),
    "value of less room": (PLAIN | {"past_value": PLAIN["past_value"][:, :, 1:]}, {}, "past_value is [1, 2, 48, 64]"),
    "heads of 16": (draw([40], 3, d=16), {}, "a head size of 16"),
    "heads of 40": (draw([40], 3, d=40), {}, "a head size of 40"),
    "heads of 272": (draw([40], 3, d=272), {}, "a head size of 272"),
    "total beyond room": (PLAIN | {"total_sequence_length": lengths(50)}, {}, "total_sequence_length is 50"),
    "total of fewer than new": (PLAIN | {"total_sequence_length": lengths(2)}, {}, "total_sequence_length is 2"),
    "total below 0": (PLAIN | {"total_sequence_length": lengths(-1)}, {}, "total_sequence_length is -1"),
    "total of two": (PLAIN | {"total_sequence_length": lengths(40, 40)}, {}, "total_sequence_length is [2]"),
    "total of none": (PLAIN | {"total_sequence_length": lengths()}, {}, "total_sequence_length is [0]"),
    "length beyond total": (PLAIN | {"seqlens_k": lengths(40)}, {}, "seqlens_k of row 0 is 40, expected 2 to 39"),
    "length below 0": (PLAIN | {"seqlens_k": lengths(-1)}, {}, "seqlens_k of row 0 is -1"),
    "length of fewer than new": (PLAIN | {"seqlens_k": lengths(1)}, {}, "seqlens_k of row 0 is 1, expected 2 to 39"),
    "length of 2^31 - 1": (PLAIN | {"seqlens_k": lengths(2**31 - 1)}, {}, "seqlens_k of row 0 is 2147483647"),
    "length of -2^31": (PLAIN | {"seqlens_k": lengths(-(2**31))}, {}, "seqlens_k of row 0 is -2147483648"),
    "lengths of more rows": (PLAIN | {"seqlens_k": lengths(39, 39)}, {}, "seqlens_k is [2], expected [1]"),
    "lengths of fewer rows": (ROWS | {"seqlens_k": lengths(39)}, {}, "seqlens_k is [1], expected [2]"),
    "second row's past below 0": (ROWS | {"seqlens_k": lengths(39, 1)}, {}, "seqlens_k of row 1 is 1"),
    "first prompt of nothing": (FIRST | {"seqlens_k": lengths(-1)}, {}, "seqlens_k of row 0 is -1, expected 0 to 2"),
    "first prompt beyond it": (FIRST | {"seqlens_k": lengths(3)}, {}, "seqlens_k of row 0 is 3, expected 0 to 2"),
    "sinks of fewer heads": (PLAIN | {"head_sink": zeros(5)}, {}, "head_sink is [5], expected [6]"),
    "sinks of none": (PLAIN | {"head_sink": zeros(0)}, {}, "head_sink is [0], expected [6]"),
}
OTHER = "other buffers than past_key"
# Name -> inputs, outputs in the buffers of inputs, and a part of the message.
ELSEWHERE: dict[str, tuple[dict[str, Array], dict[str, str], str]] = {
    "present elsewhere": (PLAIN, {"neither": "past_key"}, OTHER),
    "present_value elsewhere": (PLAIN, {"present_key": "past_key"}, OTHER),
    "present_key elsewhere": (PLAIN, {"present_value": "past_value"}, OTHER),
    "present exchanged": (PLAIN, {"present_key": "past_value", "present_value": "past_key"}, OTHER),
    "value of another type": (
        PLAIN | {"past_value": PLAIN["past_value"].astype(np.float16)},
        {"neither": "past_key"},
        "past_value is [1, 2, 49, 64] of float16 and past_key [1, 2, 49, 64] of float32",
    ),
}


@pytest.mark.parametrize("level", ["portable", "avx512"])
def test_each_is_refused_with_a_sentence(level, tmp_path_factory):
    cases = [
        Case(attention(feed, **HEADS | attributes), [feed], 2, IN_PLACE) for feed, attributes, _ in REFUSED.values()
    ]
    cases += [Case(attention(feed, **HEADS), [feed], 1, in_place) for feed, in_place, _ in ELSEWHERE.values()]
    found = run_at(level, cases, tmp_path_factory.mktemp(level))
    if found is None:
        pytest.skip(f"this machine has no {level}")
    expected = [message for _, _, message in [*REFUSED.values(), *ELSEWHERE.values()]]
    wrong = {
        name: (message, outcome.error)
        for name, message, outcome in zip([*REFUSED, *ELSEWHERE], expected, found, strict=True)
        if "DecoderAttention: " not in outcome.error or message not in outcome.error
    }
    assert wrong == {}


@pytest.mark.parametrize("form", ["float32", "float16"])
def test_a_cache_at_an_odd_address_is_refused(form):
    feed = draw([40], 3, form=form)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(pytest.importorskip("pastkey_kernels").library_path())
    model = attention(feed, **HEADS)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
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
