"""Attributes of operators, one node at a time, on each provider: right but for those in the table of providers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from benchmarks.environments import environment
from pastkey.providers import PROVIDERS

from ..shared import divided, ran
from .environments import OPENVINO, QNN, WEBGPU, environment_of

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

Array = npt.NDArray[Any]
MICROSOFT = "com.microsoft"
F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
WHEELS = {"webgpu": WEBGPU, "openvino": OPENVINO, "qnn": QNN}
# max |difference| over max |output|. The emulated HTP computes in float16. The CPU uses int8 activations where
# accuracy_level is 4, and OpenVINO whatever it is.
LIMITS = {F32: 1e-4, F16: 2e-2}
INT8_ACTIVATIONS = 3e-2

RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Node:
    """An operator with the attributes that it has anyway, and others that are set one by one, or together."""

    operator: str
    inputs: Sequence[Array | None]
    always: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]  # the first attribute of each is tried
    constant: Sequence[int] = ()  # inputs that are initializers
    outputs: int = 1
    domain: str = ""
    compared: int | None = None  # outputs; None: all


def normal(*shape: int, dtype: np.dtype[Any] = F32) -> Array:
    return RANDOM.standard_normal(shape).astype(dtype)


# --- the nodes ----------------------------------------------------------------------------------------------------
def attention(heads: int, kv_heads: int, size: int, new: int, past: int, dtype: np.dtype[Any]) -> Iterator[Node]:
    """GroupQueryAttention over a cache of `past` tokens in a buffer with room for more, if there is any."""
    room = past and past + 9
    angles = np.arange(room + new)[:, None] * 100.0 ** (-np.arange(size // 2) / (size // 2))
    query = 3 * normal(1, new, heads * size, dtype=dtype)  # the scores reach beyond a soft cap
    given = [normal(1, new, kv_heads * size, dtype=dtype) for _ in range(2)]
    cached = [normal(1, kv_heads, room, size, dtype=dtype) for _ in range(2)]
    inputs = [query, *given, *cached, np.array([past + new - 1], np.int32), np.array(past + new, np.int32)]
    tables = [np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)]
    sinks = [None, None, 2 * normal(heads, dtype=dtype)]
    always = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.5}
    whole: dict[str, Any] = {"domain": MICROSOFT, "outputs": 3, "compared": 1}
    changes: list[dict[str, Any]] = [{"scale": 0.2}, {"softcap": 2.0}, {"local_window_size": 2}]
    yield Node("GroupQueryAttention", inputs, always, changes, **whole)
    yield Node("GroupQueryAttention", [*inputs, None, None, *sinks], always, [], (11,), **whole)
    if size % 16 == 0:
        rotated = always | {"do_rotary": 1}
        yield Node("GroupQueryAttention", [*inputs, *tables], rotated, [{"rotary_interleaved": 1}], (7, 8), **whole)
        # Without it the tables are read by nobody.
        yield Node("GroupQueryAttention", [*inputs, *tables], always, [{"do_rotary": 1}], (7, 8), **whole)


def blocks(columns: int, size: int, bits: int, *, zeros: bool, dtype: np.dtype[Any]) -> Iterator[Node]:
    """MatMulNBits of (70, columns)."""
    rows, count = 70, -(-columns // size)
    weights = RANDOM.integers(0, 256, (rows, count, size * bits // 8), dtype=np.uint8)
    scales = (0.01 + 0.1 * RANDOM.random((rows, count))).astype(dtype)
    zero_points = RANDOM.integers(0, 256, (rows, -(-count * bits // 8)), dtype=np.uint8)
    for new in (1, 17):  # each has separate kernels
        inputs = [normal(1, new, columns, dtype=dtype), weights, scales, *([zero_points] if zeros else [])]
        always, constant = {"K": columns, "N": rows, "bits": bits, "block_size": size}, range(1, len(inputs))
        yield Node("MatMulNBits", inputs, always, [{"accuracy_level": 4}], constant, domain=MICROSOFT)


def others(dtype: np.dtype[Any]) -> Iterator[Node]:
    x, weight, bias = 0.1 * normal(2, 3, 48, dtype=dtype), normal(48, dtype=dtype), normal(48, dtype=dtype)
    large, positive = normal(2, 3, 48, dtype=dtype), np.abs(normal(2, 3, 48, dtype=dtype))
    epsilon, axes = [{"epsilon": 0.5}], np.array([-1])
    simplified = {"axis": -1, "epsilon": 1e-6, "stash_type": 1}
    yield Node("SimplifiedLayerNormalization", [x, weight], simplified, epsilon, (1,))
    yield Node("LayerNormalization", [x, weight, bias], {"axis": -1, "epsilon": 1e-5}, epsilon, (1, 2))
    skip = "SkipSimplifiedLayerNormalization"
    yield Node(skip, [x, 2 * x, weight], {"epsilon": 1e-6}, epsilon, (2,), domain=MICROSOFT)
    for size in (16, 32, 128):
        rows = RANDOM.integers(0, 256, (50, 128), dtype=np.uint8)
        scales, ids = RANDOM.random((50, 128 // size)).astype(dtype), RANDOM.integers(0, 50, (1, 5))
        attributes = {"bits": 8, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        yield Node("GatherBlockQuantized", [rows, ids, scales], attributes, [], (0, 2), domain=MICROSOFT)
    if dtype == F32:  # of which half precision tells too little
        yield Node("Gelu", [-positive], {}, [{"approximate": "tanh"}])
    yield Node("QuickGelu", [-positive], {"alpha": 1.0}, [{"alpha": 1.702}], domain=MICROSOFT)
    unary: dict[str, list[dict[str, Any]]] = {
        "Softmax": [{"axis": 1}], "LeakyRelu": [{"alpha": 0.3}], "Elu": [{"alpha": 0.3}],
        "ThresholdedRelu": [{"alpha": 0.3}], "HardSigmoid": [{"alpha": 0.4}, {"beta": 0.1}],
        "Transpose": [{"perm": [0, 2, 1]}], "Cast": [{"to": onnx.TensorProto.INT32}],
        "Shape": [{"start": 1}, {"end": 2}], "ArgMax": [{"axis": 2}, {"keepdims": 0}],
    }  # fmt: skip
    for name, changes in unary.items():
        yield Node(name, [large], {"to": onnx.TensorProto.DOUBLE} if name == "Cast" else {}, changes)
    for name in ("ReduceMean", "ReduceSum", "ReduceMax"):
        yield Node(name, [positive, axes], {}, [{"keepdims": 0}], (1,))
        yield Node(name, [positive, np.array([], np.int64)], {}, [{"noop_with_empty_axes": 1}], (1,))
    yield Node("Concat", [large, positive], {"axis": 2}, [{"axis": 1}])
    yield Node("Split", [large], {"axis": 2, "num_outputs": 2}, [{"num_outputs": 3}, {"axis": 0}], outputs=2)
    yield Node("Gather", [large, np.array([[1, 0]])], {}, [{"axis": 2}])
    yield Node("GatherND", [large, np.array([[1], [0]])], {}, [{"batch_dims": 1}])
    yield Node("CumSum", [large, np.array(1)], {}, [{"exclusive": 1}, {"reverse": 1}], (1,))
    yield Node("Trilu", [large, np.array(0)], {}, [{"upper": 0}], (1,))
    yield Node("TopK", [large, np.array([2])], {}, [{"axis": 1}, {"largest": 0}], (1,), outputs=2)
    yield Node("Reshape", [large, np.array([2, 3, -1])], {}, [{"allowzero": 1}], (1,))
    matrix, other = normal(4, 4, dtype=dtype), normal(4, 4, dtype=dtype)
    scaled: list[dict[str, Any]] = [{"transA": 1}, {"transB": 1}, {"alpha": 0.5}, {"beta": 2.0}]
    yield Node("Gemm", [matrix, other, normal(4, dtype=dtype)], {}, scaled, (1, 2))
    signal, kernel = normal(1, 6, 9, dtype=dtype), normal(6, 1, 3, dtype=dtype)
    always = {"kernel_shape": [3], "group": 6}
    yield Node("Conv", [signal, kernel], always, [{"pads": [2, 0]}, {"dilations": [2]}, {"strides": [2]}], (1,))


def nodes(dtype: np.dtype[Any]) -> Iterator[Node]:
    for heads, kv_heads, size in ((4, 2, 16), (3, 1, 64), (4, 4, 8)):
        # Three tokens are as many as some devices' attention reads at once without leaving out keys (`misses_keys`).
        for new, past in ((1, 3), (1, 40), (3, 0)):
            yield from attention(heads, kv_heads, size, new, past, dtype)
    for bits in (4, 8):
        for columns, size in ((80, 16), (80, 32), (256, 64), (256, 128)):
            for zeros in (False, True) if bits == 4 else (False,):
                yield from blocks(columns, size, bits, zeros=zeros, dtype=dtype)
    yield from others(dtype)


# --- running them -------------------------------------------------------------------------------------------------
def graph(node: Node, attributes: Mapping[str, Any]) -> tuple[bytes, dict[str, Array]]:
    """A model of the node, and its inputs."""
    given = {f"input_{i}": value for i, value in enumerate(node.inputs) if value is not None}
    fed = {name: value for name, value in given.items() if int(name.removeprefix("input_")) not in node.constant}
    outputs = [f"output_{i}" for i in range(attributes.get("num_outputs", node.outputs))]
    names = ["" if value is None else f"input_{i}" for i, value in enumerate(node.inputs)]
    made = helper.make_node(node.operator, names, outputs, domain=node.domain, **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in fed.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in fed.items()]
    constants = [numpy_helper.from_array(value, name) for name, value in given.items() if name not in fed]
    ends = [helper.make_empty_tensor_value_info(name) for name in outputs]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    body = helper.make_graph([made], "one_node", inputs, ends, constants)
    model = helper.make_model(body, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), fed


def on_cpu(content: bytes, fed: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, dict(fed))]


def apart(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """max |difference| over max |value|, the largest of all outputs; infinite where shapes differ."""
    if [value.shape for value in found] != [value.shape for value in expected]:
        return np.inf
    pairs = [(one.astype(np.float64), other.astype(np.float64)) for one, other in zip(found, expected, strict=True)]
    offs = [float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-9)) for a, b in pairs]
    return max(off if np.isfinite(off) else np.inf for off in offs)


class Tried(NamedTuple):
    """One node with one attribute set, and the CPU's result."""

    node: Node
    attribute: str  # "" where none is set
    expected: Sequence[Array]


def write(folder: Path, dtype: np.dtype[Any]) -> dict[str, Tried]:
    """Writes all nodes for the program, including those without a change. Returns them by their files' names."""
    tried: dict[str, Tried] = {}
    seen: set[tuple[str, str]] = set()  # on the CPU
    for node in nodes(dtype):
        content, fed = graph(node, node.always)
        plain = on_cpu(content, fed)
        for change in ({}, *node.changes):
            attribute = next(iter(change), "")
            content, fed = graph(node, {**node.always, **change})
            made = Tried(node, attribute, on_cpu(content, fed)[: node.compared])
            if apart(plain[: node.compared], made.expected) > 3 * LIMITS[dtype]:
                seen.add((node.operator, attribute))
            name = f"{len(tried):04}_{node.operator}_{attribute}"
            (folder / f"{name}.onnx").write_bytes(content)
            np.savez(folder / f"{name}.in.npz", **fed)  # type: ignore[arg-type]  # mypy reads it as a switch of savez
            tried[name] = made
    unseen = {(made.node.operator, made.attribute) for made in tried.values() if made.attribute} - seen
    assert unseen <= {("MatMulNBits", "accuracy_level"), ("Reshape", "allowzero")}, unseen
    return tried


@pytest.mark.parametrize(
    ("provider", "dtype"),
    divided([("webgpu", F32), ("webgpu", F16), ("openvino", F32), ("qnn", F32)], ci=[("webgpu", F32)]),
)
def test_attributes_change_what_they_change_on_the_cpu_unless_the_table_has_them(provider, dtype, tmp_path):
    wheel, program = WHEELS[provider], Path(__file__).with_name("single_nodes.py")
    own, tried = environment_of(wheel), write(tmp_path, dtype)
    ran(environment(*wheel), program, provider, tmp_path, env=own, timeout=500)
    taken: set[str] = set()
    wrong: dict[tuple[str, str], float] = {}
    for file in tmp_path.glob("*.out.npz"):
        node, attribute, right = tried[file.name.removesuffix(".out.npz")]
        taken.add(node.operator)
        limit = LIMITS[F16 if provider == "qnn" else dtype]
        if attribute == "accuracy_level" or (node.operator, provider) == ("MatMulNBits", "openvino"):
            limit = INT8_ACTIVATIONS
        with np.load(file) as outputs:
            off = apart([*outputs.values()][: node.compared], right)
        if off > limit:
            wrong[node.operator, attribute] = max(off, wrong.get((node.operator, attribute), 0.0))
    print(f"{provider} {dtype}: {len(taken)} operators are taken, {len(tried)} nodes were tried; {wrong}")
    table = {(operator, attribute) for operator, names in PROVIDERS[provider].ignores.items() for attribute in names}
    assert len(taken) > 10
    assert wrong.keys() == table, wrong
