"""Plants faults into a copy of a bundle, and asks which checks of `pastkey verify` find them.

    python -m tools.planted_faults BUNDLE SOURCE

A fault edits the graphs, so that a copy shares the weights file. The faults are those of a fused graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import PastkeyError, first_line

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from pastkey.export.graft.probe.observe import CacheLayer

# Inputs of GroupQueryAttention.
_PAST_KEY, _PAST_VALUE, _SEQLENS_K, _TOTAL, _COS, _SIN = 3, 4, 5, 6, 7, 8


def main() -> int:
    """Prints a table of the faults that fit a bundle, and which checks find each."""
    from pastkey.export.measure.reference import open_exported

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("source", help="what it was exported from")
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    module, layers = open_exported(arguments.source, bundle)
    print("| fault | found by |\n| --- | --- |")
    with tempfile.TemporaryDirectory(dir=arguments.bundle.parent) as folder:
        for fault in FAULTS:
            found = found_by(bundle, fault, module, layers, Path(folder))
            if found is not None:
                print(f"| {fault} | {', '.join(found) or '**not found**'} |", flush=True)
    return 0


def found_by(
    bundle: Bundle, fault: str, module: nn.Module | None, layers: tuple[CacheLayer, ...], folder: Path
) -> list[str] | None:
    """The names of the checks that fail on a copy of `bundle` in `folder` with the fault; None if it does not fit."""
    from pastkey.export.measure.verify import verify

    planted = plant(bundle, FAULTS[fault], folder / "planted")
    if planted is None:
        return None
    try:
        found = verify(planted, module, layers=layers, providers="cpu")
        return [check.name for check in found.checks if not check.ok]
    except PastkeyError as error:
        return [f"{type(error).__name__}: {first_line(error)[:80]}"]
    finally:
        shutil.rmtree(planted.path)


def plant(bundle: Bundle, fault: Fault, folder: Path, *native: str) -> Bundle | None:
    """A copy of the bundle with the fault, which shares the weights; None if its graphs have no place for it."""
    import onnx

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle.path, folder, copy_function=os.link)
    made = Bundle(folder, bundle.manifest)
    planted = False
    for path in [folder / name for name in native] or [made.all_logits_graph, made.last_logits_graph]:
        model = onnx.load(path, load_external_data=False)
        graph = _Graph(model, path != made.all_logits_graph, bundle.manifest.context_length)
        planted |= fault(graph)
        path.unlink()  # a link to the bundle's own
        onnx.save(graph.model, path)
    return made if planted else None


# --- editing ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class _Graph:
    """One graph of a bundle, and how faults change it."""

    model: onnx.ModelProto
    last: bool  # whether it is the last-logits graph
    context: int  # tokens

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type in kinds]

    def constant(self, array: npt.NDArray[Any]) -> str:
        """A new initializer."""
        from onnx import numpy_helper

        name = f"planted.{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(array.copy(), name))
        return name

    def add(self, before: onnx.NodeProto, kind: str, *inputs: str, **attributes: Any) -> str:
        """A new node before another. Returns the name of its result."""
        from onnx import helper

        place = next(i for i, node in enumerate(self.model.graph.node) if node is before)
        name = f"planted.{len(self.model.graph.node)}.result"
        self.model.graph.node.insert(place, helper.make_node(kind, [*inputs], [name], **attributes))
        return name

    def behind(self, node: onnx.NodeProto, kind: str, *others: str, **attributes: Any) -> None:
        """Puts a node between the first result of `node` and its readers."""
        from onnx import helper

        right, wrong = node.output[0], f"planted.{len(self.model.graph.node)}.right"
        node.output[0] = wrong
        place = next(i for i, other in enumerate(self.model.graph.node) if other is node)
        self.model.graph.node.insert(place + 1, helper.make_node(kind, [wrong, *others], [right], **attributes))

    def change(self, node: onnx.NodeProto, name: str, change: Callable[[Any], Any], default: Any = None) -> bool:
        """Gives an attribute the value that `change` makes of it; where that is None, it does not fit."""
        from onnx import helper

        found = [attribute for attribute in node.attribute if attribute.name == name]
        before = helper.get_attribute_value(found[0]) if found else default
        value = None if before is None else change(before)
        if value is not None:
            for attribute in found:
                node.attribute.remove(attribute)
            node.attribute.append(helper.make_attribute(name, value))
        return value is not None

    def shape_of(self, name: str) -> tuple[int, ...]:
        return next(tuple(value.dims) for value in self.model.graph.initializer if value.name == name)

    def replace(self, node: onnx.NodeProto, index: int, kind: str, *others: str, **attributes: Any) -> None:
        """Puts a node between an input of `node` and its value, which is the first input of the new one."""
        node.input[index] = self.add(node, kind, node.input[index], *others, **attributes)

    def tokens(self, before: onnx.NodeProto) -> str:
        """The number of new tokens, (1,) int64."""
        return self.add(before, "Shape", names.INPUT_IDS, start=1, end=2)

    def past(self, before: onnx.NodeProto) -> str:
        """The number of cached tokens, (1,) int64."""
        attention = self.nodes("GroupQueryAttention")[0]
        total = self.add(before, "Cast", attention.input[_TOTAL], to=7)
        total = self.add(before, "Reshape", total, self.constant(np.array([1])))
        return self.add(before, "Sub", total, self.tokens(before))


Fault = Callable[[_Graph], bool]
FAULTS: dict[str, Fault] = {}


def enters(faults: dict[str, Fault]) -> Callable[[str], Callable[[Fault], Fault]]:
    """The decorator of these faults; its argument is the effect of a fault."""

    def named(what: str) -> Callable[[Fault], Fault]:
        return lambda function: faults.setdefault(what, function)

    return named


_fault = enters(FAULTS)


def _middle(nodes: list[Any]) -> Any:
    return nodes[len(nodes) // 2]


# --- weights ------------------------------------------------------------------------------------------------------
def _matrices(graph: _Graph) -> list[tuple[Any, int, bool]]:
    """(node, index of the input that scales its matrix, whether rows come first) of each matrix of the layers."""
    known = {value.name: len(value.dims) for value in graph.model.graph.initializer}
    plain = [(node, 1, False) for node in graph.nodes("MatMul", "Gemm") if known.get(node.input[1]) == 2]
    return plain or [(node, 2, True) for node in graph.nodes("MatMulNBits")[:-1]]


def _columns(graph: _Graph, node: Any, rows_first: bool) -> int:
    """The number of results of a matrix."""
    if rows_first:
        return int(next(attribute.i for attribute in node.attribute if attribute.name == "N"))
    return graph.shape_of(node.input[1])[1]


def _matrix(change: Callable[[npt.NDArray[Any]], object]) -> Fault:
    """The results of one matrix times these factors."""

    def apply(graph: _Graph) -> bool:
        node, index, rows_first = _middle(_matrices(graph))
        factors = np.ones(_columns(graph, node, rows_first), np.float32)
        change(factors)
        graph.replace(node, index, "Mul", graph.constant(factors[:, None] if rows_first else factors))
        return True

    return apply


# Half of the rows, since a norm behind a matrix would undo one factor of all.
FAULTS["half of one matrix times 1.001"] = _matrix(lambda factors: factors[::2].fill(1.001))
FAULTS["half of one matrix times 1.01"] = _matrix(lambda factors: factors[::2].fill(1.01))
FAULTS["one row of one matrix is zero"] = _matrix(lambda factors: factors.put(factors.size // 2, 0))


@_fault("the scale of one block doubled")
def _doubled_block(graph: _Graph) -> bool:
    factors = _of_blocks(graph, 1.0, 2.0, np.float32)
    if factors is None:
        return False
    node, index, _ = _middle(_matrices(graph))
    graph.replace(node, index, "Mul", graph.constant(factors))
    return True


@_fault("the zero point of one block off by one")
def _zero_point(graph: _Graph) -> bool:
    points = _of_blocks(graph, 128, 129, np.uint8)
    node = _middle(_matrices(graph))[0]
    if points is None or len(node.input) > 3:  # 4-bit matrices have zero points already, two to a byte
        return False
    node.input.append(graph.constant(points))
    return True


def _of_blocks(graph: _Graph, usual: float, planted: float, kind: Any) -> npt.NDArray[Any] | None:
    """(N, blocks) of the middle matrix, with another number for one block."""
    node = _middle(_matrices(graph))[0]
    if node.op_type != "MatMulNBits":
        return None
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    found = np.full((sizes["N"], -(-sizes["K"] // sizes["block_size"])), usual, kind)
    found[sizes["N"] // 2, 0] = planted
    return found


@_fault("epsilon of one norm 100 times too large")
def _epsilon(graph: _Graph) -> bool:
    norms = [node for node in graph.model.graph.node if node.op_type.endswith("LayerNormalization")]
    return graph.change(_middle(norms), "epsilon", lambda epsilon: epsilon * 100)


# --- positions ----------------------------------------------------------------------------------------------------
def _move(graph: _Graph, moved: Callable[[Any], str]) -> bool:
    """Lets each reader of position ids, or of a table of rotations, read the positions `moved`, (context,)."""
    named = [(node, *pair) for node in graph.model.graph.node for pair in enumerate(node.input)]
    tables = (("GroupQueryAttention", _COS), ("GroupQueryAttention", _SIN))
    readers = [(n, i) for n, i, name in named if name == names.POSITION_IDS or (name and (n.op_type, i) in tables)]
    for node, index in readers:
        if node.input[index] == names.POSITION_IDS:
            node.input[index] = graph.add(node, "Gather", moved(node), node.input[index], axis=0)
        else:
            graph.replace(node, index, "Gather", moved(node), axis=0)
    return bool(readers)


@_fault("positions from 64 on shifted by one")
def _shifted(graph: _Graph) -> bool:
    at = np.arange(graph.context)
    return _move(graph, lambda _: graph.constant(np.minimum(at + (at >= 64), graph.context - 1)))


@_fault("positions from 100 on stand still")
def _still(graph: _Graph) -> bool:
    return _move(graph, lambda _: graph.constant(np.minimum(np.arange(graph.context), 100)))


@_fault("a single token has the next position")
def _single_position(graph: _Graph) -> bool:
    def moved(node: Any) -> str:
        next_one = graph.add(node, "Cast", _when_single(graph, node), to=7)
        later = graph.add(node, "Add", graph.constant(np.arange(graph.context)), next_one)
        return graph.add(node, "Min", later, graph.constant(np.array([graph.context - 1])))

    return _move(graph, moved)


# --- attention ----------------------------------------------------------------------------------------------------
def _attention(graph: _Graph) -> Any:
    return _middle(graph.nodes("GroupQueryAttention"))


@_fault("the scale of one attention 1 % off")
def _attention_scale(graph: _Graph) -> bool:
    return graph.change(_attention(graph), "scale", lambda scale: scale * 1.01 or None)


@_fault("one window one token too wide")
def _window(graph: _Graph) -> bool:
    nodes = graph.nodes("GroupQueryAttention")
    return any(graph.change(node, "local_window_size", lambda size: size + 1 if size > 0 else None) for node in nodes)


@_fault("padding off by one in a batch")
def _padding(graph: _Graph) -> bool:
    for node in graph.nodes("GroupQueryAttention"):
        total = graph.add(node, "Sub", node.input[_TOTAL], graph.constant(np.array(1, np.int32)))
        longer = graph.add(node, "Add", node.input[_SEQLENS_K], graph.constant(np.array([1], np.int32)))
        node.input[_SEQLENS_K] = graph.add(node, "Min", longer, total)
    return True


# --- the cache ----------------------------------------------------------------------------------------------------
@_fault("one layer reads the cached values of another")
def _exchanged(graph: _Graph) -> bool:
    calls = graph.nodes("GroupQueryAttention")
    if len(calls) < 2:
        return False
    calls[-1].input[_PAST_VALUE] = calls[-2].input[_PAST_VALUE]
    return True


@_fault("every row of a batch reads the first one's cached values")
def _first_row(graph: _Graph) -> bool:
    node = _attention(graph)
    past = node.input[_PAST_VALUE]
    rows = graph.add(node, "Shape", past)
    zero, one = graph.constant(np.array([0])), graph.constant(np.array([1]))
    graph.replace(node, _PAST_VALUE, "Slice", zero, one, zero)
    graph.replace(node, _PAST_VALUE, "Expand", rows)
    return True


def _stale(when: Callable[[_Graph, Any], str], what: int = _PAST_VALUE) -> Fault:
    """The last cached row of one layer is zero, in the runs that `when` (1,) bool says."""

    def apply(graph: _Graph) -> bool:
        node = _attention(graph)
        rows = graph.add(node, "Shape", node.input[what], start=2, end=3)
        zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
        every = graph.add(node, "Range", zero, graph.add(node, "Squeeze", rows), one)
        last = graph.add(node, "Sub", graph.past(node), graph.constant(np.array([1])))
        wrong = graph.add(node, "And", graph.add(node, "Equal", every, last), when(graph, node))
        right = graph.add(node, "Cast", graph.add(node, "Not", wrong), to=1)
        column = graph.add(node, "Unsqueeze", right, graph.constant(np.array([1])))  # (S, 1)
        graph.replace(node, what, "Mul", column)
        return True

    return apply


def _when_single(graph: _Graph, node: Any) -> str:
    return graph.add(node, "Equal", graph.tokens(node), graph.constant(np.array([1])))


def _when_several(graph: _Graph, node: Any) -> str:
    return graph.add(node, "Greater", graph.tokens(node), graph.constant(np.array([1])))


def _at_64(graph: _Graph, node: Any) -> str:
    rest = graph.add(node, "Mod", graph.past(node), graph.constant(np.array([64])))
    even = graph.add(node, "Equal", rest, graph.constant(np.array([0])))
    return graph.add(node, "And", even, _when_single(graph, node))


FAULTS["the last cached value is stale where a chunk begins"] = _stale(_when_several)
FAULTS["the last cached value is stale at a single token"] = _stale(_when_single)
FAULTS["the last cached key is stale at a single token"] = _stale(_when_single, _PAST_KEY)
FAULTS["the last cached value is stale at single tokens 64, 128, ..."] = _stale(_at_64)


# --- the last-logits graph ----------------------------------------------------------------------------------------
@_fault("the last-logits graph exchanges two rows of the head")
def _head_rows(graph: _Graph) -> bool:
    if not graph.last:
        return False
    size = next(value for value in graph.model.graph.output if value.name == names.LOGITS).type.tensor_type.shape.dim[2]
    order = np.arange(size.dim_value)
    order[[0, 1]] = 1, 0
    (node,) = [node for node in graph.model.graph.node if names.LOGITS in node.output]
    graph.behind(node, "Gather", graph.constant(order), axis=2)
    return True


@_fault("the last-logits graph answers for the token before the last")
def _earlier(graph: _Graph) -> bool:
    nodes = [node for node in graph.model.graph.node if names.LOGITS_START in node.input]
    for node in nodes:
        index = [*node.input].index(names.LOGITS_START)
        long = graph.add(node, "Greater", graph.tokens(node), graph.constant(np.array([16])))  # more than are drafted
        start = graph.add(node, "Sub", node.input[index], graph.add(node, "Cast", long, to=7))
        node.input[2] = graph.add(node, "Where", long, graph.constant(np.array([-1])), node.input[2])
        node.input[index] = start
    return bool(nodes)


if __name__ == "__main__":
    sys.exit(main())
