"""Graphs that no export writes: each is refused by one sentence, and nothing is read or written out of bounds.

With a library built with PASTKEY_SANITIZE (kernels/README.md), a read or write out of bounds ends the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from pastkey.contract import names

from .matmul_graphs import Weights, graph, matmul, norm_matmul
from .running import LEVELS, Array, Case, Outcome, run_at

N, K = 34, 96
W, W4 = Weights.draw(N, K), Weights.draw(N, K, bits=4)
X = np.ones((2, K), np.float32)
FEED = {"x": X}


def changed(**arrays: Array | None) -> dict[str, Array]:
    """The initializers with other arrays; None leaves one out."""
    return {name: array for name, array in (W.named(bias=True) | arrays).items() if array is not None}


def custom(
    inputs: list[str],
    arrays: dict[str, Array],
    fed: dict[str, int] | None = None,
    **attributes: Any,
) -> bytes:
    """A MatMulInt8 of the named inputs; those of `fed` are fed with tensors of its types."""
    node = helper.make_node("MatMulInt8", inputs, ["y"], domain="pastkey", **attributes)
    return graph([node], arrays, ["x", *(fed or {})], ["y"], fed)


def without(arrays: dict[str, Array], name: str) -> dict[str, Array]:
    return {other: array for other, array in arrays.items() if other != name}


ALL = ["x", "w", "codes", "row_scales", "bias"]
GAMMA = {"gamma": np.ones(K, np.float32)}


def norm(arrays: dict[str, Array], **attributes: Any) -> bytes:
    return norm_matmul(changed() | GAMMA | arrays, skip=True, beta="beta" in arrays, summed=True, **attributes)


REFUSED: dict[str, tuple[bytes, dict[str, Array], str]] = {
    "x of rank 0": (matmul(changed()), {"x": np.array(1, np.float32)}, "X has shape [], expected [..., 96]"),
    "x too short": (matmul(changed()), {"x": X[:, :64]}, "X has shape [2, 64], expected [..., 96]"),
    "x too long": (matmul(changed()), {"x": np.ones((2, 128), np.float32)}, "X has shape [2, 128]"),
    "x empty along K": (matmul(changed()), {"x": X[:, :0]}, "X has shape [2, 0]"),
    "w of rank 2": (matmul(changed(w=W.codes.reshape(N, K))), FEED, "W has shape [34, 96], expected [N, K / 32, 32]"),
    "w in blocks of 16": (matmul(changed(w=W.codes.reshape(N, 6, 16))), FEED, "W has shape [34, 6, 16]"),
    "w in blocks of 31": (matmul(changed(w=W.codes[:, :, 1:])), FEED, "W has shape [34, 3, 31]"),
    "w of 4 bits": (matmul(W4.named(), bits=8), FEED, "W has shape [34, 3, 16], expected [N, K / 32, 32]"),
    "w of 8 bits as 4": (matmul(changed(), bits=4), FEED, "W has shape [34, 3, 32], expected [N, K / 32, 16]"),
    "five bits": (matmul(changed(), bits=5), FEED, "bits is 5, expected 8 or 4"),
    "zero points of 8 bits": (
        matmul(changed(zeros=np.zeros((N, K // 32), np.uint8))),
        FEED,
        "zero_points is given, expected only with 4 bits",
    ),
    "too few zero points": (
        matmul(W4.named() | {"zeros": np.zeros((N, 1), np.uint8)}, bits=4),
        FEED,
        "zero_points has shape [34, 1], expected [34, 2]",
    ),
    "zero points of float": (
        matmul(W4.named() | {"zeros": np.zeros((N, 3), np.float32)}, bits=4),
        FEED,
        "tensor(float",
    ),
    "zero points computed": (
        custom(
            ["x", "w", "codes", "row_scales", "", "zeros"],
            without(W4.named(), "zeros"),
            {"zeros": TensorProto.UINT8},
            bits=4,
        ),
        FEED | {"zeros": W4.named()["zeros"]},
        "zero_points is computed",
    ),
    "w without rows": (matmul(changed(w=W.codes[:0])), FEED, "W has shape [0, 3, 32]"),
    "w without blocks": (matmul(changed(w=W.codes[:, :0])), FEED, "W has shape [34, 0, 32]"),
    "w of int8": (matmul(changed(w=W.codes.astype(np.int8))), FEED, "tensor(int8)"),
    "w computed": (
        custom(ALL, changed(w=None), {"w": TensorProto.UINT8}),
        FEED | {"w": W.codes},
        "W is computed, expected a constant initializer",
    ),
    "too few scales": (matmul(changed(codes=W.scale_codes[:-1])), FEED, "scales has shape [33, 3], expected [34, 3]"),
    "too many scales": (matmul(changed(codes=np.repeat(W.scale_codes, 2))), FEED, "scales has shape [204]"),
    "scales of int32": (matmul(changed(codes=W.scale_codes.astype(np.int32))), FEED, "scales is of int32"),
    "scales of float16": (matmul(changed(codes=W.scale_codes.astype(np.float16))), FEED, "scales is of float16"),
    "scales computed": (
        custom(ALL, changed(codes=None), {"codes": TensorProto.UINT8}),
        FEED | {"codes": W.scale_codes},
        "scales is computed",
    ),
    "no row scales": (custom(ALL[:3], changed(row_scales=None, bias=None)), FEED, "row_scales is missing"),
    "row scales beside float scales": (
        custom(["x", "w", "scales", "row_scales"], W.named() | W.named(float_scales=True)),
        FEED,
        "row_scales is given",
    ),
    "too few row scales": (matmul(changed(row_scales=W.row_scales[1:])), FEED, "row_scales has shape [33, 1]"),
    "row scales of float64": (matmul(changed(row_scales=W.row_scales.astype(float))), FEED, "tensor(double)"),
    "bias too long": (matmul(changed(bias=np.ones(N + 1, np.float32))), FEED, "bias has shape [35], expected 34"),
    "bias computed": (
        custom(ALL, changed(bias=None), {"bias": TensorProto.FLOAT}),
        FEED | {"bias": W.bias},
        "bias is computed",
    ),
    "no scales": (custom(["x", "w", ""], {"w": W.codes}), FEED, ""),
    "three terms": (matmul(changed(), terms=3), FEED, "terms is 3, expected 1 to 2"),
    "no terms": (matmul(changed(), terms=0), FEED, "terms is 0"),
    "terms of float": (matmul(changed(), terms=2.0), FEED, "attribute terms is of another type, expected an integer"),
    "list of terms": (matmul(changed(), terms=[2, 2]), FEED, "attribute terms is of another type, expected an integer"),
    "terms of texts": (matmul(changed(), terms=["2"]), FEED, "attribute terms is of another type, expected an integer"),
    "terms of a tensor": (
        matmul(changed(), terms=helper.make_tensor("terms", TensorProto.INT64, [1], [2])),
        FEED,
        "attribute terms is of another type",
    ),
    "list of activations": (matmul(changed(), activation=["silu"]), FEED, "attribute activation is of another type"),
    "later version": (matmul(changed(), version=3), FEED, "version is 3, expected 1 to 2: a later one needs a newer"),
    "version of a text": (matmul(changed(), version="2"), FEED, "attribute version is of another type"),
    "unknown activation": (matmul(changed(), activation="relu"), FEED, 'activation is "relu", expected'),
    "activation of int": (matmul(changed(), activation=1), FEED, "attribute activation is of another type"),
    "long activation": (matmul(changed(), activation="%s" * 10_000), FEED, "activation is"),
    "third gate": (matmul(changed(), gate=2), FEED, "gate is 2, expected -1 to 1"),
    "odd gate": (matmul(Weights.draw(33, K).named(), gate=0), FEED, "gate is 0 and W has 33 rows, expected an even"),
    "skip of another shape": (norm({}), FEED | {"skip": X[:1]}, "skip has shape [1, 96] and X [2, 96]"),
    "gamma too short": (norm({"gamma": np.ones(K - 1, np.float32)}), FEED | {"skip": X}, "gamma has shape [95]"),
    "beta too long": (norm({"beta": np.ones(K + 1, np.float32)}), FEED | {"skip": X}, "beta has shape [97]"),
    "unknown norm": (norm({}, norm="batch"), FEED | {"skip": X}, 'norm is "batch"'),
    "negative epsilon": (norm({}, epsilon=-1.0), FEED | {"skip": X}, "epsilon is -1"),
    "epsilon of NaN": (norm({}, epsilon=float("nan")), FEED | {"skip": X}, "epsilon is"),
    "normed x too short": (norm({}), {"x": X[:, 1:], "skip": X[:, 1:]}, "X has shape [2, 95]"),
}
ALLOWED: dict[str, tuple[bytes, dict[str, Array]]] = {
    "x of rank 1": (matmul(changed()), {"x": X[0]}),
    "version of today": (matmul(changed(), version=names.NATIVE_OPERATORS), FEED),
    "x of rank 4": (matmul(changed()), {"x": X.reshape(1, 2, 1, K)}),
    "scales in another shape": (matmul(changed(codes=W.scale_codes.reshape(-1, 1))), FEED),
    "no rows of many": (matmul(changed()), {"x": np.zeros((3, 0, K), np.float32)}),
    "no normed rows": (norm({}), {"x": X[:0], "skip": X[:0]}),
    "epsilon of zero, row of zeros": (norm({}, epsilon=0.0), {"x": X * 0, "skip": X * 0}),
    "many rows": (matmul(changed(), gate=1), {"x": np.ones((5000, K), np.float32)}),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    def run(level: str) -> dict[str, Outcome]:
        cases = {name: Case(model, [feed], threads=2) for name, (model, feed, _) in REFUSED.items()}
        cases |= {name: Case(model, [feed], threads=2) for name, (model, feed) in ALLOWED.items()}
        found = run_at(level, list(cases.values()), tmp_path_factory.mktemp(level))
        if found is None:
            pytest.skip(f"this machine has no {level}")
        return dict(zip(cases, found, strict=True))

    return run


def test_wrong_graphs_and_inputs_are_refused(outcomes):
    found = outcomes("portable")  # the checks are the same for every level
    for name, (_, _, message) in REFUSED.items():
        assert found[name].error, name
        assert message in found[name].error, (name, found[name].error)


@pytest.mark.parametrize("level", LEVELS)
def test_unusual_graphs_and_inputs_run(outcomes, level):
    found = outcomes(level)
    assert {name: found[name].error for name in ALLOWED if found[name].error} == {}
    assert {name: found[name].outputs[0][0].shape for name in ALLOWED} == {
        "x of rank 1": (N,),
        "version of today": (2, N),
        "x of rank 4": (1, 2, 1, N),
        "scales in another shape": (2, N),
        "no rows of many": (3, 0, N),
        "no normed rows": (0, N),
        "epsilon of zero, row of zeros": (2, N),
        "many rows": (5000, N // 2),
    }


@pytest.mark.parametrize("name", ["bias", "row_scales"])
def test_floats_at_an_odd_place_of_their_file_are_refused(name, tmp_path):
    """They are read where the file is mapped."""
    model, content = onnx.load_from_string(matmul(changed())), b""
    for tensor in model.graph.initializer:
        raw = numpy_helper.to_array(tensor).tobytes()
        content += bytes(-len(content) % 64 + (tensor.name == name))
        tensor.raw_data = raw
        set_external_data(tensor, "weights", len(content), len(raw))
        tensor.ClearField("raw_data")
        content += raw
    (tmp_path / "weights").write_bytes(content)
    onnx.save(model, tmp_path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(pytest.importorskip("pastkey_kernels").library_path())
    with pytest.raises(Exception, match=f"MatMulInt8: {name} begins at an address.* that is no multiple of 4"):
        onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])


def test_a_level_that_does_not_exist_is_refused(tmp_path_factory):
    with pytest.raises(
        AssertionError, match="PASTKEY_KERNELS is avx1024, and this machine and this build have portable"
    ):
        run_at("avx1024", [Case(matmul(changed()), [FEED])], tmp_path_factory.mktemp("level"))
