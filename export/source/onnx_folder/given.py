"""Reads the ONNX graph of a decoder that another program exported, and gives it pastkey's names and axes.

The exporters differ in names, opset and inputs. `read_given` checks a graph and describes it, `standard_form` returns
it as pastkey's standard graph. Each change is exact:

    1. convert the opset to OPSET, unless it is newer
    2. rename past and present; order the inputs
    3. add attention_mask and position_ids if the graph has none, unread
    4. replace the number of logits to keep by 0, for all of them, and cast int64 inputs where the graph reads int32
    5. simplify, with numbers instead of known sizes, and name weights
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import version_converter

from pastkey.contract import names
from pastkey.contract.bundle import KVGeometry
from pastkey.errors import InputError, first_line
from pastkey.files.external_data import external_data
from pastkey.files.folder import is_inside
from pastkey.quiet import quiet
from pastkey.values import shown

from ...graph.edit import OPSET, NodeBuilder, add_weight, producer, replace_node, replace_uses, sole_consumer, weight
from ...graph.simplify import simplify

_ROUNDS = 2  # numbers instead of sizes make shapes known, and known shapes make numbers
OLDEST_OPSET = 11  # the first with Range; exporters of decoders write 13 and newer
EXPORT_COMMAND = "optimum-cli export onnx --model MODEL --task text-generation-with-past FOLDER"
# How exporters name the cache: keys and values of layer N in inputs, and in outputs.
_FORMS = (
    ("past_key_values.N.key", "past_key_values.N.value", "present.N.key", "present.N.value"),
    (
        "input.cache.layers.N.keys",
        "input.cache.layers.N.values",
        "output.cache.layers.N.keys",
        "output.cache.layers.N.values",
    ),
)
_IDS = (names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS)
_KEPT = ("num_logits_to_keep", "logits_to_keep")  # 0 means all
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_QUANTIZED = frozenset(
    {
        *("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "MatMulInteger", "DynamicQuantizeLinear"),
        *("DequantizeLinear", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QMoE"),
    }
)


@dataclass(frozen=True)
class GivenGraph:
    """The graph in a file: its inputs and outputs."""

    path: Path
    inputs: Mapping[str, ir.DataType]  # in the file's order
    layers: tuple[KVGeometry, ...]
    renamed: Mapping[str, str]  # the file's names of past and present -> pastkey's, in pastkey's order
    weights: int  # numbers in all initializers
    fused: bool  # whether all attention is GroupQueryAttention, so that past and present may be one buffer

    @property
    def past(self) -> dict[str, tuple[int, int]]:
        """The file's names of past -> heads and their size, keys and values of each layer in turn."""
        past = [name for name, new in self.renamed.items() if new.startswith(names.PAST_PREFIX)]
        sizes = [(g.kv_heads, size) for g in self.layers for size in (g.key_head_size, g.value_head_size)]
        return dict(zip(past, sizes, strict=True))

    @property
    def present(self) -> list[str]:
        """The file's names of present, keys and values of each layer in turn."""
        return [name for name, new in self.renamed.items() if new.startswith(names.PRESENT_PREFIX)]


# --- reading ------------------------------------------------------------------------------------------------------
def read_given(path: Path) -> GivenGraph:
    """Reads a graph's description.

    Raises:
        InputError: It is not the graph of a decoder with a cache in float32, or has external data elsewhere.
        IntegrityError: It is not an ONNX file.
    """
    _check_external_data(path)
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir have their own errors
        raise InputError(f"{path} is not an ONNX graph ({first_line(error)}): fetch or export it again") from error
    common.RemoveInitializersFromInputsPass()(model)
    inputs = {str(value.name): value for value in model.graph.inputs}
    outputs = {str(value.name): value for value in model.graph.outputs}
    _check_opset(path, model)
    renamed = _cache_names(path, inputs, outputs)
    _check_ends(path, inputs, outputs, renamed)
    _check_precision(path, model, inputs)
    layers = _layers(path, inputs, renamed)
    weights = sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)
    fused = sum(node.op_type == "GroupQueryAttention" for node in model.graph) == len(layers)
    types = {name: value.dtype for name, value in inputs.items() if value.dtype is not None}
    return GivenGraph(path, types, layers, renamed, weights, fused)


def _check_external_data(path: Path) -> None:
    """Raises InputError if a weight's data is outside of the graph's folder. onnxruntime finds missing files."""
    for data in external_data(path):
        if not is_inside(data.location):
            raise InputError(
                f"{path} reads weights from {shown(data.location)}, outside of its folder: copy that file next to the "
                "graph and name it there, or export the model again"
            )


def _check_opset(path: Path, model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise InputError(
            f"{path} is of opset {opset}, and pastkey reads {OLDEST_OPSET} and newer: export the model again, with  "
            f"{EXPORT_COMMAND}"
        )


def _cache_names(path: Path, inputs: Mapping[str, object], outputs: Mapping[str, object]) -> dict[str, str]:
    """Returns the file's names of past and present -> pastkey's. Raises InputError if they do not match."""
    if "use_cache_branch" in inputs:
        raise InputError(
            f"{path} is a merged decoder, two graphs in one (use_cache_branch): export the model as one graph with  "
            f"{EXPORT_COMMAND}"
        )
    for form in _FORMS:
        found = [_numbered(name, ends) for name, ends in zip(form, (inputs, inputs, outputs, outputs), strict=True)]
        if not found[0] and not found[1]:
            continue
        layers = sorted(set().union(*found))
        for layer in layers:
            for name, numbers in zip(form, found, strict=True):
                if layer not in numbers:
                    there = next(n for n, others in zip(form, found, strict=True) if layer in others)
                    raise InputError(
                        f"{path} has {there.replace('N', str(layer))} and no {name.replace('N', str(layer))}: every "
                        "layer needs keys and values as inputs and as outputs, export the model again"
                    )
        ours = (names.past_key, names.past_value, names.present_key, names.present_value)
        return {
            name.replace("N", str(layer)): ours[place](number)
            for places in ((0, 1), (2, 3))
            for number, layer in enumerate(layers)
            for place in places
            for name in (form[place],)
        }
    raise InputError(
        f"{path} has no past keys and values, so that every token would cost the whole text: export the model "
        f"with them,  {EXPORT_COMMAND}"
    )


def _numbered(form: str, ends: Mapping[str, object]) -> set[int]:
    pattern = re.compile(re.escape(form).replace("N", "([0-9]{1,4})"))
    return {int(found[1]) for name in ends if (found := pattern.fullmatch(name)) is not None}


def _check_ends(
    path: Path, inputs: Mapping[str, ir.Value], outputs: Mapping[str, ir.Value], renamed: Mapping[str, str]
) -> None:
    """Raises InputError for inputs that a decoder's runtime does not have, and for missing ones."""
    for name in (names.INPUT_IDS, names.LOGITS):
        if name not in (inputs if name == names.INPUT_IDS else outputs):
            raise InputError(f"{path} has no {name}: expected the graph of a decoder from {names.INPUT_IDS} to logits")
    other = next((name for name in inputs if name not in (*_IDS, *_KEPT, *renamed)), None)
    if other is not None:
        raise InputError(
            f"{path} has inputs {shown(other)}, and a decoder's graph has {', '.join(_IDS)} and past keys and values: "
            f"export only the model, with  {EXPORT_COMMAND}"
        )
    for name in (*_IDS, *_KEPT):
        value = inputs.get(name)
        if value is not None and (value.dtype not in _INTEGERS or (name in _IDS and _rank(value) != 2)):
            raise InputError(f"{path} has {name} as {_told(value)}: expected whole numbers (batch, tokens)")
    ids = inputs[names.INPUT_IDS]
    if ids.shape is not None and any(isinstance(size, int) for size in ids.shape):
        raise InputError(
            f"{path} has input_ids as {_told(ids)}, of a fixed size: export the model with dynamic axes (with "
            f"transformers' exporter dynamic=True and multi_token_decode=True), or with  {EXPORT_COMMAND}"
        )
    for name in renamed:
        value = inputs.get(name) or outputs[name]
        if _rank(value) != 4:
            raise InputError(f"{path} has {name} as {_told(value)}: expected (batch, heads, tokens, head size)")


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _told(value: ir.Value) -> str:
    kind = "an unknown type" if value.dtype is None else value.dtype.name.lower()
    return f"{kind} {'of unknown shape' if value.shape is None else tuple(map(str, value.shape))}"


def _check_precision(path: Path, model: ir.Model, inputs: Mapping[str, ir.Value]) -> None:
    """Raises InputError unless the graph computes in float32, with weights that nobody quantized."""
    for node in model.graph.all_nodes():
        if node.op_type in _QUANTIZED:
            raise InputError(
                f"{path} is quantized already (it has {node.op_type}): give the float32 graph, model.onnx, pastkey "
                "quantizes it itself"
            )
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    values = [*inputs.values(), *model.graph.initializers.values()]
    half = next((value for value in values if value.dtype in halves), None)
    if half is not None:
        assert half.dtype is not None
        raise InputError(
            f"{path} is in {half.dtype.name.lower()} ({half.name}): give the float32 graph, model.onnx, or export it "
            f"with  {EXPORT_COMMAND} --dtype fp32"
        )


def _number(size: int | ir.SymbolicDim) -> int | None:
    """Returns a size that is a number, which transformers' exporter writes as the name of a dynamic axis."""
    text = str(size if isinstance(size, int) else size.value)
    return int(text) if text.isdecimal() else None


def _layers(path: Path, inputs: Mapping[str, ir.Value], renamed: Mapping[str, str]) -> tuple[KVGeometry, ...]:
    sizes: dict[str, tuple[int, int]] = {}
    for name, new in renamed.items():
        if not new.startswith(names.PAST_PREFIX):
            continue
        value = inputs[name]
        heads, size = (None, None) if value.shape is None else (_number(value.shape[1]), _number(value.shape[3]))
        if value.dtype is not ir.DataType.FLOAT or heads is None or size is None:
            raise InputError(
                f"{path} has {name} as {_told(value)}: expected float (batch, heads, tokens, head size) with numbers "
                "for heads and head size, by which an empty cache is made; export the model again"
            )
        sizes[new] = heads, size
    layers = []
    for number in range(len(sizes) // 2):
        (heads, key_size), (value_heads, value_size) = sizes[names.past_key(number)], sizes[names.past_value(number)]
        if heads != value_heads:
            raise InputError(f"{path} has {heads} heads of keys and {value_heads} of values in layer {number}")
        layers.append(KVGeometry(heads, key_size, value_size))
    return tuple(layers)


# --- the standard form --------------------------------------------------------------------------------------------
def standard_form(given: GivenGraph) -> ir.Model:
    """Returns the graph with pastkey's names, inputs and opset. Raises InputError if the opset cannot be converted."""
    model = ir.load(given.path)
    common.RemoveInitializersFromInputsPass()(model)
    _convert(model, given.path)
    ends = {str(value.name): value for value in [*model.graph.inputs, *model.graph.outputs]}
    for name in given.renamed:
        ends[name].name = f"renamed.{name}"  # first of all: a new name may be another tensor's old one
    for name, new in given.renamed.items():
        ends[name].name = new
    for value in list(model.graph.inputs):
        if value.name in _KEPT:
            assert value.dtype is not None
            zeros = np.zeros([1] * (_rank(value) or 0), value.dtype.numpy())
            everything = add_weight(model, f"{value.name}.all", zeros)
            replace_uses(value, everything)
            model.graph.inputs.remove(value)
        elif value.dtype is ir.DataType.INT32:
            _cast(model, value)
    named = {str(value.name): value for value in model.graph.inputs}
    for name in _IDS:
        if name not in named:
            named[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64))
    past = [new for new in given.renamed.values() if new.startswith(names.PAST_PREFIX)]
    outputs = {str(value.name): value for value in model.graph.outputs}
    present = [new for new in given.renamed.values() if new.startswith(names.PRESENT_PREFIX)]
    model.graph.inputs[:] = [named[name] for name in (*_IDS, *past)]
    model.graph.outputs[:] = [outputs[name] for name in (names.LOGITS, *present)]
    for value in model.graph.inputs:
        value.shape = ir.Shape(_axes(str(value.name), given.layers))
    for value in model.graph.outputs:
        value.shape = None  # of axes by the file's names; inference finds them by pastkey's
    for _ in range(_ROUNDS):
        common.ShapeInferencePass()(model)
        _fold_sizes(model)
        simplify(model)
    _name_weights(model)
    return model


def _name_weights(model: ir.Model) -> None:
    """Names the weights that TorchScript numbers (onnx::MatMul_740) after the module that reads them."""
    for value in tuple(model.graph.initializers.values()):
        node = sole_consumer(value)
        place = "" if node is None or not node.name else node.name.strip("/").rpartition("/")[0].replace("/", ".")
        name = f"{place}.weight"
        if str(value.name).startswith("onnx::") and place and name not in model.graph.initializers:
            value.name = name


def _axes(name: str, layers: tuple[KVGeometry, ...]) -> tuple[str | int, ...]:
    """Returns the axes of one of pastkey's inputs."""
    sizes = {names.past_key(i): (g.kv_heads, g.key_head_size) for i, g in enumerate(layers)}
    sizes |= {names.past_value(i): (g.kv_heads, g.value_head_size) for i, g in enumerate(layers)}
    if name in sizes:
        return names.BATCH, sizes[name][0], names.PAST, sizes[name][1]
    return names.BATCH, names.TOTAL if name == names.ATTENTION_MASK else names.SEQUENCE


def _fold_sizes(model: ir.Model) -> None:
    """Rewrites forms that only older exporters write, by the shapes that are known.

    1. Gather or Slice of a shape        -> the numbers, where the shape has them
    2. Reshape to sizes that are computed -> to 0 for an axis that stays, and -1 for one that is not known
    3. Reshape, Gemm, Reshape            -> MatMul and Add, over all axes but the last
    4. 1 / x                             -> Reciprocal
    """
    for node in tuple(model.graph):
        made = node.outputs[0]
        if made.is_graph_output():
            continue
        if node.op_type in ("Gather", "Slice") and (sizes := _read_sizes(node)) is not None:
            replace_uses(made, add_weight(model, f"{made.name}.size", sizes))
        elif node.op_type == "Reshape" and (gemm := producer(node.inputs[0], "Gemm")) is not None:
            _spread_gemm(model, node, gemm)
        elif node.op_type == "Reshape" and (axes := _constant_axes(node)) is not None:
            node.replace_input_with(1, add_weight(model, f"{made.name}.axes", axes))
            node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        elif (
            node.op_type == "Div" and (one := weight(node.inputs[0])) is not None and one.size == 1 and one.item() == 1
        ):
            replace_node(model, node, ir.node("Reciprocal", [node.inputs[1]], name=node.name))


def _constant_axes(node: ir.Node) -> np.ndarray | None:
    """Applies rule 2: returns the second input of a Reshape, None if more than one size is not known."""
    value, made = node.inputs[0], node.outputs[0]
    known = value is not None and value.shape is not None and made.shape is not None
    if not known or weight(node.inputs[1]) is not None:
        return None
    assert value is not None
    assert value.shape is not None
    assert made.shape is not None
    before = [*value.shape, *[None] * len(made.shape)]
    axes = [size if isinstance(size, int) else 0 if size == before[i] else -1 for i, size in enumerate(made.shape)]
    return np.array(axes) if axes.count(-1) <= 1 else None


def _spread_gemm(model: ir.Model, node: ir.Node, gemm: ir.Node) -> None:
    """Applies rule 3 where the Reshapes only join and split the axes before the last."""
    flat, numbers = producer(gemm.inputs[0], "Reshape"), gemm.attributes
    value = None if flat is None else flat.inputs[0]
    plain = numbers.get_float("alpha", 1.0) == numbers.get_float("beta", 1.0) == 1 and numbers.get_int("transA", 0) == 0
    if value is None or value.shape is None or node.outputs[0].shape is None or not plain or len(gemm.inputs) < 3:
        return
    if list(value.shape)[:-1] != list(node.outputs[0].shape)[:-1] or len(value.shape) < 3:
        return
    builder = NodeBuilder(model, str(gemm.name))
    matrix = gemm.inputs[1]
    if numbers.get_int("transB", 0):
        matrix = builder.add("Transpose", matrix, perm=[1, 0])
    builder.add("Add", builder.add("MatMul", value, matrix), gemm.inputs[2])
    replace_node(model, node, *builder.nodes)


def _read_sizes(node: ir.Node) -> np.ndarray | None:
    """Returns the numbers that a Gather or Slice reads of a value's shape, None if they are not known."""
    read = producer(node.inputs[0], "Shape")
    value = None if read is None or read.attributes else read.inputs[0]
    constants = [weight(v) for v in node.inputs[1:]]
    if value is None or value.shape is None or any(array is None for array in constants):
        return None
    chosen, places = list[int | ir.SymbolicDim](value.shape), [array for array in constants if array is not None]
    if node.op_type == "Gather":
        index = places[0]
        found = [chosen[int(place)] for place in index.reshape(-1)]
    elif all(array.size == 1 for array in places):
        start, end, _, step = (*(int(array.item()) for array in places), *(0, 1)[len(places) - 2 :])
        index, found = np.zeros(1), chosen[start:end:step]
    else:
        return None
    known = [size for size in found if isinstance(size, int)]
    return (
        np.array(known, np.int64).reshape(index.shape if node.op_type == "Gather" else -1) if known == found else None
    )


def _convert(model: ir.Model, path: Path) -> None:
    opset = model.graph.opset_imports[""]
    if opset >= OPSET:
        return
    try:
        with quiet():
            version_converter.convert_version(model, target_version=OPSET, fallback=True)
    except Exception as error:  # the converter's own, and those of onnx
        raise InputError(f"{path}, of opset {opset}, cannot be converted to {OPSET}: {first_line(error)}") from error
    if model.graph.opset_imports[""] != OPSET:
        raise InputError(
            f"{path}, of opset {opset}, cannot be converted to {OPSET}: export the model again, with  {EXPORT_COMMAND} "
            f"--opset {OPSET}"
        )


def _cast(model: ir.Model, value: ir.Value) -> None:
    """Makes an int32 input one of int64."""
    builder = NodeBuilder(model, f"{value.name}.int32")
    cast = builder.add("Cast", value, to=ir.DataType.INT32)
    for node, index in tuple(value.uses()):
        if node is not cast.producer():
            node.replace_input_with(index, cast)
    cast.type, value.type = ir.TensorType(ir.DataType.INT32), ir.TensorType(ir.DataType.INT64)
    model.graph.insert_before(model.graph[0], builder.nodes)
