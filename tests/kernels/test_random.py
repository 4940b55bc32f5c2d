"""Random graphs and inputs, many of them wrong: each run ends in outputs or in an error, never in the process's end.

With a library built with PASTKEY_SANITIZE (kernels/README.md), a read or write out of bounds ends the process, and
PASTKEY_FUZZ=20000 in the environment runs so many more.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from .conftest import each_level
from .graphs import FORMS, Weights, case, draw, evicted, matmul, norm_matmul
from .running import Array, Case

CASES = int(os.environ.get("PASTKEY_FUZZ", 150))  # of each operator and level
TYPES = (np.float32, np.float16, np.float64, np.int8, np.uint8, np.int32, np.int64)
WRONG = (-(2**31), -2, -1, 0, 1, 2, 3, 7, 1 << 16, 2**31 - 1)
Random = np.random.Generator


def wrong_array(rng: Random, array: Array) -> Array:
    """The array with another shape, type or values."""
    kind = rng.integers(6)
    if kind == 0:
        return array.astype(TYPES[rng.integers(len(TYPES))])
    if kind == 1 and array.ndim and array.size:
        axis = rng.integers(array.ndim)
        return array.take(rng.integers(0, array.shape[axis], rng.integers(0, array.shape[axis] + 3)), axis)
    if kind == 2:
        return array[None]
    if kind == 3:
        return array.reshape(-1)
    if kind == 4:
        return np.ascontiguousarray(array.T)
    if array.dtype.kind == "f":
        values = rng.choice(np.array([np.nan, np.inf, -np.inf, 6e4], array.dtype))
        return np.where(rng.random(array.shape) < 0.1, values, array)
    limits = np.iinfo(array.dtype)
    return np.full_like(array, np.clip(rng.choice(WRONG), limits.min, limits.max))


def some_wrong(rng: Random, arrays: dict[str, Array]) -> dict[str, Array]:
    """Each array wrong with a small chance; now and then one is missing."""
    found = {name: wrong_array(rng, array) if rng.random() < 0.12 else array for name, array in arrays.items()}
    if len(found) > 1 and rng.random() < 0.1:
        del found[rng.choice([*found])]
    return found


def attention_case(rng: Random) -> Case:
    h, g = rng.choice([(6, 2), (4, 4), (9, 3), (8, 1)]).tolist()
    d, new = int(rng.choice([32, 48, 64, 80, 128])), int(rng.choice([1, 2, 5, 9, 20, 33]))
    lengths = [int(new + rng.integers(0, 150)) for _ in range(rng.integers(1, 4))]
    forms = {"form": str(rng.choice(["float32", "float16"])), "rotary": int(rng.choice([0, 16, d]))}
    forms |= {"packed": bool(rng.random() < 0.7), "sink": bool(rng.random() < 0.2)}
    feed = draw(lengths, new, (h, g), d, **forms, seed=int(rng.integers(1 << 30)))
    if rng.random() < 0.3:
        feed = evicted(feed, *(int(rng.integers(0, length - new + 2)) for length in lengths))
    attributes: dict[str, Any] = {"num_heads": h, "kv_num_heads": g, "do_rotary": int("cos" in feed)}
    if rng.random() < 0.3:
        attributes["local_window_size"] = int(rng.choice([-1, 1, 5, 128, *WRONG]))
    if rng.random() < 0.2:
        attributes["softcap"] = float(rng.choice([0, 5, -1, np.nan, np.inf, 1e-30]))
    if rng.random() < 0.2:
        name = str(rng.choice([*attributes, "rotary_interleaved", "smooth_softmax", "scale"]))
        attributes[name] = float(rng.normal()) if name in ("softcap", "scale") else int(rng.choice(WRONG))
    wrong = some_wrong(rng, feed)
    kept = {name: wrong.get(name, feed[name]) for name in ("query", "past_key", "past_value")}
    return case([wrong | kept], threads=int(rng.integers(1, 4)), **attributes)


def matmul_case(rng: Random) -> Case:
    n, k = int(rng.integers(1, 70)), 32 * int(rng.choice([1, 2, 3, 4, 5, 8, 16, 24]))
    drawn = Weights.draw(n, k, str(rng.choice(FORMS)))
    weights = drawn.named(str(rng.choice(drawn.stored)), bool(rng.random() < 0.5))
    attributes: dict[str, Any] = {"bits": drawn.bits}
    if rng.random() < 0.5:
        attributes["activation"] = str(rng.choice(["none", "silu", "gelu", "gelu_tanh", "relu"]))
    for name in ("terms", "gate"):
        if rng.random() < 0.3:
            attributes[name] = int(rng.choice([-1, 0, 1, 2, *WRONG]))
    x = rng.standard_normal((int(rng.integers(0, 40)), k)).astype(np.float32)
    if rng.random() < 0.5:
        feed = some_wrong(rng, {"x": x})
        return Case(matmul({**weights, **some_wrong(rng, weights), "w": weights["w"]}, **attributes), [feed], threads=2)
    skip, beta = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    ones = np.ones(k, np.float32)
    arrays = weights | {"gamma": ones} | ({"beta": ones} if beta else {})
    arrays |= some_wrong(rng, arrays)
    model = norm_matmul(arrays, skip=skip, beta=beta, summed=bool(rng.random() < 0.5), **attributes)
    feed = some_wrong(rng, {"x": x} | ({"skip": x} if skip else {}))
    return Case(model, [feed], threads=2)


@each_level
@pytest.mark.parametrize("make", [attention_case, matmul_case])
def test_a_random_case_ends_in_outputs_or_in_an_error(make, level, run):
    found = run(level, {seed: make(np.random.default_rng(seed)) for seed in range(CASES)})
    refused = [outcome.error for outcome in found.values() if outcome.error]
    assert not [error for error in refused if "has changed" in error]
    assert CASES / 10 < len(refused) < CASES * 9 / 10
