"""Plants faults of a kernel into a copy of a bundle's native graph, and asks whether its golden logits find them.

    python -m tools.native_faults BUNDLE

A fault of the library is planted as what it computes: as other constants or attributes, or as nodes around one call.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.runtime import Engine
from pastkey.runtime.engine.golden import Golden, differences

from .planted_faults import Fault, _Graph, enters, plant

_BLOCK = 32
_COS, _SIN = 7, 8  # inputs of DecoderAttention
FAULTS: dict[str, Fault] = {}


def main() -> int:
    """Prints a table: each fault, how far the logits are from the golden ones, and whether the limit finds it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = open_bundle(parser.parse_args().bundle)
    golden = Golden.of(bundle)
    print(f"| fault | off (limit {golden.limit:.3f}) | found |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=bundle.path.parent) as folder:
        for name, fault in {"none": lambda graph: True, **FAULTS}.items():
            made = planted(bundle, fault, Path(folder) / "planted")
            if made is not None:
                off = max(differences(Engine(made, native=True), golden))
                print(f"| {name} | {off:.3f} | {'yes' if off > golden.limit else 'no'} |", flush=True)
    return 0


def planted(bundle: Bundle, fault: Fault, folder: Path) -> Bundle | None:
    """A copy of the bundle with a fault in its native graph, over the same weights; None if it does not fit."""
    return plant(bundle, fault, folder, names.NATIVE_GRAPH)


_fault = enters(FAULTS)


# --- products -----------------------------------------------------------------------------------------------------
def _products(graph: _Graph) -> list[tuple[Any, int, int]]:
    """The products without a norm, with their numbers of columns K and of results N."""
    found = []
    for node in graph.nodes("MatMulInt8"):
        rows, *shape = graph.shape_of(node.input[1])
        found.append((node, int(np.prod(shape)) * (2 if _integer(node, "bits") == 4 else 1), rows))
    return found


def _integer(node: Any, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def _factors(change: Callable[[np.ndarray], None], *, of_columns: bool) -> Fault:
    """The columns of X times factors, as wrong scales of W's blocks do, or the results."""

    def apply(graph: _Graph) -> bool:
        for node, columns, rows in _products(graph):
            factors = np.ones(columns if of_columns else rows, np.float32)
            change(factors)
            if of_columns:
                graph.replace(node, 0, "Mul", graph.constant(factors))
            else:
                graph.behind(node, "Mul", graph.constant(factors))
        return True

    return apply


_columns = functools.partial(_factors, of_columns=True)
_rows = functools.partial(_factors, of_columns=False)


def _set(part: slice, factor: Any) -> Callable[[np.ndarray], None]:
    return lambda factors: factors.__setitem__(part, factor)


FAULTS["one block has twice its scale"] = _columns(_set(slice(0, _BLOCK), 2))
FAULTS["the first block is left out"] = _columns(_set(slice(0, _BLOCK), 0))
FAULTS["the last block is left out"] = _columns(_set(slice(-_BLOCK, None), 0))
FAULTS["every other block 5 % too large"] = _columns(lambda x: x.reshape(-1, 2 * _BLOCK)[:, :_BLOCK].fill(1.05))
FAULTS["the last column is left out"] = _columns(_set(slice(-1, None), 0))
FAULTS["every other row scale 2 % off"] = _rows(_set(slice(0, None, 2), 1.02))
FAULTS["the last result is left out"] = _rows(_set(slice(-1, None), 0))


@_fault("a tile of 16 results is transposed")
def _order(graph: _Graph) -> bool:
    for node, _, rows in _products(graph):
        order = np.arange(rows)
        order[:16] = order[:16].reshape(4, 4).T.ravel()
        graph.behind(node, "Gather", graph.constant(order), axis=2)
    return True


@_fault("X is rounded toward zero")
def _toward_zero(graph: _Graph) -> bool:
    """X becomes the numbers of its truncated codes, which round to these codes."""
    for node, _, _ in _products(graph):
        blocks = graph.add(node, "Reshape", node.input[0], graph.constant(np.array([0, 0, -1, _BLOCK])))
        most = graph.add(node, "ReduceMax", graph.add(node, "Abs", blocks), graph.constant(np.array([3])))
        scale = graph.add(node, "Div", most, graph.constant(np.array(127, np.float32)))
        scale = graph.add(node, "Max", scale, graph.constant(np.array(1e-30, np.float32)))
        codes = graph.add(node, "Div", blocks, scale)
        size = graph.add(node, "Floor", graph.add(node, "Add", graph.add(node, "Abs", codes), graph.constant(_TIE)))
        codes = graph.add(node, "Mul", graph.add(node, "Sign", codes), size)
        whole = graph.add(node, "Shape", node.input[0])
        node.input[0] = graph.add(node, "Reshape", graph.add(node, "Mul", codes, scale), whole)
    return True


_TIE = np.array(1e-4, np.float32)  # the largest code, 127, may come out as 126.99999


# --- attention ----------------------------------------------------------------------------------------------------
def _attribute(name: str, change: Callable[[Any], Any], default: Any = None) -> Fault:
    """`change`: the wrong value for the right one; None where the fault does not fit."""

    def apply(graph: _Graph) -> bool:
        return sum(graph.change(node, name, change, default) for node in graph.nodes("DecoderAttention")) > 0

    return apply


FAULTS["scores 2 % too large (a wrong key scale)"] = _attribute("scale", lambda scale: scale * 1.02 or None, 0.0)
FAULTS["scores 10 % too large"] = _attribute("scale", lambda scale: scale * 1.1 or None, 0.0)
FAULTS["no soft cap"] = _attribute("softcap", lambda cap: 0.0 if cap else None, 0.0)
FAULTS["windows one token too narrow"] = _attribute("local_window_size", lambda n: n - 1 if n > 1 else None, -1)
FAULTS["keys before the last 128 are left out"] = _attribute("local_window_size", lambda n: 128, -1)


def _rotated(change: Callable[[_Graph, Any], None]) -> Fault:
    def apply(graph: _Graph) -> bool:
        nodes = [node for node in graph.nodes("DecoderAttention") if node.input[_COS]]
        for node in nodes:
            change(graph, node)
        return bool(nodes)

    return apply


def _next_position(graph: _Graph, node: Any) -> None:
    positions = np.arange(graph.context)
    rows = graph.constant(np.minimum(positions + (positions >= 64), positions[-1]))
    for index in (_COS, _SIN):
        graph.replace(node, index, "Gather", rows, axis=0)


FAULTS["rotation by the next position from 64 on"] = _rotated(_next_position)
FAULTS["rotation the other way"] = _rotated(lambda graph, node: graph.replace(node, _SIN, "Neg"))
FAULTS["rotation of neighbours, not halves"] = _attribute("rotary_interleaved", lambda n: 1 - n, 0)


@_fault("two query heads exchanged")
def _heads(graph: _Graph) -> bool:
    for node in graph.nodes("DecoderAttention"):
        heads = _integer(node, "num_heads")
        order = np.arange(heads)
        order[[0, -1]] = order[[-1, 0]]
        index = np.arange(heads * _head_size(graph, node)).reshape(heads, -1)[order].ravel()
        graph.behind(node, "Gather", graph.constant(index), axis=2)
    return True


def _head_size(graph: _Graph, node: Any) -> int:
    past = next(value for value in graph.model.graph.input if value.name == node.input[3])
    return int(past.type.tensor_type.shape.dim[3].dim_value)


@_fault("single tokens: results 10 % too small")
def _single(graph: _Graph) -> bool:
    for node in graph.nodes("DecoderAttention"):
        several = graph.add(node, "Greater", graph.tokens(node), graph.constant(np.array([1])))
        share = graph.add(node, "Where", several, graph.constant(_ONE), graph.constant(_LESS))
        graph.behind(node, "Mul", share)
    return True


_ONE, _LESS = np.array(1, np.float32), np.array(0.9, np.float32)


if __name__ == "__main__":
    sys.exit(main())
