"""Quantizes static graphs to QuantizeLinear and DequantizeLinear for QNN's NPUs: 8-bit weights, 16-bit activations.

Only MatMuls are quantized. With norms, softmax and rotations quantized as well, an NPU writes different texts, although
a CPU that simulates the same graph does not. The calibration text determines the ranges of activations.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.quiet import quiet
from pastkey.runtime import Engine
from pastkey.runtime.engine.caches.static_graphs import StaticGraphs
from pastkey.runtime.engine.engine import Ids
from pastkey.runtime.providers.ort import quantization_tools

from ..clean import fold_transposed_weights, strip_traces
from ..write.weights_file import WeightsFile

# Added to the score of a masked token. It is small, so that the calibrated ranges stay useful.
MASKED = -100.0
_DECODED = 12  # tokens of a window that are decoded one by one, spread evenly
_OPERATORS = ["MatMul"]

Feeds = dict[str, np.ndarray]


def quantize_static(source: Bundle, target: Path, windows: Sequence[Ids], shard_size: int | None = None) -> None:
    """Quantizes the static graphs of the float32 bundle `source` to int8 in the folder `target`, over one data file.

    `windows` are token ids (T,) that calibrate the ranges of activations. `shard_size`: see `WeightsFile`.
    """
    file = WeightsFile(target / names.STATIC_DATA, shard_size)
    fed = [*zip(source.static_graphs, _feeds(source, windows), strict=True)]
    context = source.manifest.context_length
    ranges: dict[str, tuple[float, float]] = {}
    for path, feeds in fed:
        for name, (low, high) in _ranges(path, feeds, context).items():
            lowest, highest = ranges.get(name, (low, high))
            ranges[name] = min(low, lowest), max(high, highest)
    for path, feeds in fed:
        model = _quantized(path, feeds[:1], ranges, context)
        file.take_weights(model)
        ir.save(model, target / path.relative_to(source.path))


def _feeds(source: Bundle, windows: Sequence[Ids]) -> tuple[list[Feeds], list[Feeds]]:
    """Returns the feeds of the one-token graph and of the chunk graph over the windows."""
    engine = Engine(source, providers="cpu")
    static = engine.cache
    assert isinstance(static, StaticGraphs)
    fed: dict[int, list[Feeds]] = {}

    def keep(tokens: int, start: int, inputs: Mapping[str, np.ndarray]) -> None:
        # Most of a long context's past is holes: `_whole` puts them back.
        fed.setdefault(tokens, []).append(
            {name: (array[:, :, :start] if _is_past(name) else array).copy() for name, array in inputs.items()}
        )

    static.watch = keep
    for ids in windows:
        engine.reset()
        engine.prefill(ids)
        static.watch = None
        for end in np.unique(np.linspace(0, len(ids) - 1, min(_DECODED, len(ids))).astype(int))[::-1].tolist():
            engine.trim(end)
            static.watch = keep
            engine.decode(int(ids[end]))
            static.watch = None
        static.watch = keep
    assert source.manifest.static is not None
    return fed[1], fed.get(source.manifest.static.chunk, fed[1])


def _is_past(name: str) -> bool:
    return name.startswith(names.PAST_PREFIX)


def _whole(feeds: Feeds, context_length: int) -> Feeds:
    """Puts back the holes of the past, which are zeros."""
    return {
        name: np.pad(array, [(0, 0), (0, 0), (0, context_length - array.shape[2]), (0, 0)]) if _is_past(name) else array
        for name, array in feeds.items()
    }


def _ranges(path: Path, feeds: list[Feeds], context_length: int) -> dict[str, tuple[float, float]]:
    """Returns the minimum and maximum of each activation that a MatMul reads or writes, by its name."""
    quantization, _ = quantization_tools()
    with _prepared(path) as plain:
        augmented = plain.with_name("augmented.onnx")
        calibrator = quantization.create_calibrator(plain, _OPERATORS, str(augmented), use_external_data_format=True)
        calibrator.collect_data(_reader(quantization, feeds, context_length))
        found = calibrator.compute_data()
        ends = {name: found[name].range_value for name in found.keys()}  # noqa: SIM118  # not a Python mapping
        return {name: (float(low.item()), float(high.item())) for name, (low, high) in ends.items()}


@contextlib.contextmanager
def _prepared(path: Path) -> Iterator[Path]:
    """Yields a graph as onnxruntime's quantization tools read it, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="pastkey-") as temporary, quiet():  # advice on graphs not prepared its way
        plain = Path(temporary) / "plain.onnx"
        model = ir.load(path)
        fold_transposed_weights(model, shared=True)
        ir.save(model, plain, external_data="plain.data")
        yield plain


def _quantized(
    path: Path, feeds: list[Feeds], ranges: Mapping[str, tuple[float, float]], context_length: int
) -> ir.Model:
    """Quantizes a float32 graph file to int8 with these ranges of activations, which both graphs share."""
    quantization, qnn = quantization_tools()
    with _prepared(path) as plain:
        made = plain.with_name("made.onnx")
        known = {str(value.name) for node in ir.load(plain).graph for value in [*node.inputs, *node.outputs] if value}
        config = qnn.get_qnn_qdq_config(
            plain,
            _reader(quantization, feeds, context_length),
            activation_type=quantization.QuantType.QUInt16,
            weight_type=quantization.QuantType.QUInt8,
            weight_symmetric=True,
            op_types_to_quantize=_OPERATORS,
            init_overrides={
                name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
                for name, (low, high) in ranges.items()
                if name in known
            },
        )
        config.use_external_data_format = True
        quantization.quantize(plain, made, config)
        quantized = ir.load(made)
        for value in quantized.graph.initializers.values():  # their file is removed with its folder
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=value.const_value.dtype)
    strip_traces(quantized)
    return quantized


def _reader(quantization: Any, feeds: list[Feeds], context_length: int) -> Any:
    """Wraps the feeds as a data reader for onnxruntime's calibration."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # a class that is known at run time
        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Feeds | None:
            found = next(self.rest, None)
            return None if found is None else _whole(found, context_length)

        def rewind(self) -> None:
            self.rest = iter(feeds)

    return Reader()


def in_int8(bundle: Bundle) -> Bundle:
    """Returns the static float32 bundle with the manifest of its int8 graphs."""
    static = bundle.manifest.static
    assert static is not None
    return replace(bundle, manifest=replace(bundle.manifest, static=replace(static, masked=MASKED)))
