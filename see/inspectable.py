"""Finds the inner values of a decoder's graph: attention weights, and the residual stream after each layer.

No architecture is named. Attention calls are found by the cache's outputs. onnxruntime's GroupQueryAttention returns
its own weights; in a graph that spells attention out, they are the factors of the values.

The residual stream after attention call i is the last value that everything from call i to the logits passes through
before call i + 1 joins (a post-dominator). So norms before or after a block, parallel blocks and scaled residuals need
no separate rule. The rest after the last layer, the final norm and the output head, is a separate graph: the logit
lens runs it on every layer's stream (nostalgebraist 2020, "interpreting GPT: the logit lens").
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.errors import ContractError
from pastkey.export.graph.edit import CONTRIB_DOMAIN, NodeBuilder, producer, replace_value, shape_of

_AFTER_SOFTMAX = 2  # GroupQueryAttention's qk_output: the weights, as a fourth output
_CARRIES = {"Reshape", "Expand", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Cast", "Tile", "Slice"}
_SHAPES = {"Shape", "Size"}  # their outputs carry lengths, not the model's numbers


@dataclass(frozen=True)
class AttentionNames:
    """The names of one attention call's values."""

    weights: str  # (H, W, S) of the last tokens
    output: str  # (1, T, H * D), (1, H, T, D), or grouped


@dataclass(frozen=True)
class Inspectable:
    """A graph whose inner values are outputs. Values are named; None where the decoder has no such value."""

    model: ir.Model
    calls: tuple[AttentionNames, ...]  # in order, one per entry of the manifest's layers
    embedding: str | None  # (1, T, E): the tokens' embedding, where positions are added to it
    positions: str | None  # (1, T, E) or fewer axes: the summand
    entering: str | None  # (1, T, E): the input of the first layer
    streams: tuple[str | None, ...]  # (1, T, E) after each attention call and the rest of its layer
    head: ir.Model | None  # from the last stream to the logits (1, T, V)


def inspectable(model: ir.Model, calls: int, shown: int) -> Inspectable:
    """Makes the inner values of an all-logits graph outputs; changes it.

    Args:
        model: The graph.
        calls: Number of attention calls.
        shown: W, the last tokens whose weights are outputs; all where a text has fewer. All weights of all layers
            would need gigabytes.

    Raises:
        ContractError: The weights of an attention call are not found.
    """
    _unfuse_skips(model)
    nodes = [_attention(model, number) for number in range(calls)]
    flow = _Flow(model)
    chains = [flow.chain(node) for node, _ in nodes]
    streams = _streams(chains, nodes[-1][0])
    embedding, positions, entering = _embedded(model, flow, chains[0])
    head = None if streams[-1] is None else _head(model, streams[-1])
    rows = [_last_rows(model, weights, number, shown) for number, (_, weights) in enumerate(nodes)]
    inner = [*rows, *(node.outputs[0] for node, _ in nodes)]
    extra = dict.fromkeys(v for v in (*inner, embedding, positions, entering, *streams) if v is not None)
    model.graph.outputs.extend(value for value in extra if not value.is_graph_output())
    return Inspectable(
        model,
        tuple(
            AttentionNames(str(one.name), str(node.outputs[0].name)) for one, (node, _) in zip(rows, nodes, strict=True)
        ),
        _name(embedding),
        _name(positions),
        _name(entering),
        tuple(map(_name, streams)),
        head,
    )


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _unfuse_skips(model: ir.Model) -> None:
    """Makes of each SkipSimplifiedLayerNormalization the sum and the norm that it replaces."""
    for node in tuple(model.graph):
        if node.op_type != "SkipSimplifiedLayerNormalization":
            continue
        builder, epsilon = NodeBuilder(model, f"{node.name}_unfused"), node.attributes["epsilon"].as_float()
        total = builder.add("Add", *node.inputs[:2])
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        norm = builder.add("SimplifiedLayerNormalization", total, node.inputs[2], **attributes)
        model.graph.insert_before(node, builder.nodes)
        replace_value(model, node.outputs[0], norm)
        if len(node.outputs) > 3 and node.outputs[3].name:
            replace_value(model, node.outputs[3], total)
        model.graph.remove(node, safe=True)


# --- attention ----------------------------------------------------------------------------------------------------
def _attention(model: ir.Model, number: int) -> tuple[ir.Node, ir.Value]:
    """Returns the node whose output is attention call `number`'s result, and its weights."""
    name = names.present_value(number)
    present = next((value for value in model.graph.outputs if value.name == name), None)
    node = None if present is None else producer(present, "GroupQueryAttention")
    if node is not None and node.domain == CONTRIB_DOMAIN:
        node.attributes["qk_output"] = ir.AttrInt64("qk_output", _AFTER_SOFTMAX)
        node.resize_outputs(4)
        node.outputs[3].name = f"attention_weights.{number}"
        return node, node.outputs[3]
    found = [] if present is None else list(_products(present))
    if not found or found[-1].inputs[0] is None:
        raise ContractError(
            f"no attention weights were found in attention call {number}: no matrix is multiplied by its cached values"
        )
    return found[-1], found[-1].inputs[0]


def _last_rows(model: ir.Model, weights: ir.Value, number: int, shown: int) -> ir.Value:
    """The weights (H, W, S) of the last tokens, of weights (..., S) over a text without a past."""
    builder = NodeBuilder(model, f"see_weights_{number}")
    bounds = {"heads": -1, "start": -shown, "end": np.iinfo(np.int64).max, "axis": 1}
    heads, *cut = (builder.constant(name, np.array([bound])) for name, bound in bounds.items())
    length = builder.add("Shape", weights, start=-1)
    shape = builder.add("Concat", heads, length, length, axis=0)
    rows = builder.add("Slice", builder.add("Reshape", weights, shape), *cut)  # grouped heads: on the tokens' axis
    made = weights.producer()
    assert made is not None
    model.graph.insert_after(made, builder.nodes)
    return rows


def _products(value: ir.Value) -> Iterator[ir.Node]:
    """Yields the matrix products whose right side is these cached values, in the order of the graph."""
    for node, place in value.uses():
        if node.op_type == "MatMul" and place == 1:
            yield node
        elif node.op_type in _CARRIES and place == 0 and not _swaps_last_axes(node):
            yield from _products(node.outputs[0])


def _swaps_last_axes(node: ir.Node) -> bool:
    """Whether it transposes for scores, as a row does that is key and value alike."""
    if node.op_type != "Transpose":
        return False
    axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else [1, 0]
    return axes[-1] != len(axes) - 1


# --- the residual stream ------------------------------------------------------------------------------------------
class _Flow:
    """The post-dominators of a graph's nodes: the nodes on every path from a node to the logits.

    Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001; a graph without loops needs one pass.
    """

    def __init__(self, model: ir.Model) -> None:
        nodes = list(model.graph)
        logits = next(value for value in model.graph.outputs if value.name == names.LOGITS)
        self._order = {id(node): number for number, node in enumerate(nodes)}
        self._next: dict[int, ir.Node | None] = {id(logits.producer()): None}
        for node in reversed(nodes):
            readers = [reader for value in node.outputs for reader, _ in value.uses()]
            readers = [reader for reader in readers if id(reader) in self._next and reader.op_type not in _SHAPES]
            if readers and node.op_type not in _SHAPES and id(node) not in self._next:
                self._next[id(node)] = functools.reduce(self._meeting, readers)
        ids = next(value for value in model.graph.inputs if value.name == names.INPUT_IDS)
        self.of_ids = {id(ids)}  # values that depend on the tokens
        for node in nodes:
            if node.op_type not in _SHAPES and any(id(value) in self.of_ids for value in node.inputs):
                self.of_ids |= {id(value) for value in node.outputs}

    def _meeting(self, one: ir.Node, other: ir.Node) -> ir.Node:
        while one is not other:
            behind = self._order[id(one)] < self._order[id(other)]
            following = self._next[id(one if behind else other)]
            assert following is not None  # both reach the logits
            one, other = (following, other) if behind else (one, following)
        return one

    def reaches(self, node: ir.Node) -> bool:
        """Whether the logits depend on more of this node's result than its shape."""
        return id(node) in self._next

    def chain(self, node: ir.Node) -> list[ir.Node]:
        """The nodes after this one, in order, that everything from it to the logits passes through."""
        found: list[ir.Node] = []
        following = self._next.get(id(node))
        while following is not None:
            found.append(following)
            following = self._next[id(following)]
        return found


def _before(chain: list[ir.Node], later: list[ir.Node]) -> list[ir.Node]:
    """The part of a chain that is not in a later one."""
    joined = {id(node) for node in later}
    return [node for node in chain if id(node) not in joined]


def _streams(chains: list[list[ir.Node]], attention: ir.Node) -> list[ir.Value | None]:
    """Returns the residual stream after each attention call, of which `attention` is the last."""
    parts = [_before(chain, later) for chain, later in itertools.pairwise(chains)]
    found: list[ir.Value | None] = [part[-1].outputs[0] if part else None for part in parts]
    last = chains[-1]
    if parts and parts[-1]:  # as far behind the last call as the stream before it is behind its own
        alike = [node.op_type for node in parts[-1]]
        if [node.op_type for node in last[: len(alike)]] == alike:
            return [*found, last[len(alike) - 1].outputs[0]]
    sums = [node for node in last if _is_residual(node, last, attention)]
    return [*found, sums[-1].outputs[0] if sums else None]


def _is_residual(node: ir.Node, chain: list[ir.Node], attention: ir.Node) -> bool:
    """Whether a node adds to a passing value: an earlier value of the chain, or one that attention did not make."""
    if node.op_type != "Add" or not all(map(_computed, node.inputs)):
        return False
    one, other = (value.producer() for value in node.inputs if value is not None)
    known = {id(earlier) for earlier in chain}
    return one is not other and any(
        made is None or id(made) in known or not _follows(made, attention) for made in (one, other)
    )


def _follows(node: ir.Node, earlier: ir.Node) -> bool:
    """Whether a node depends on an earlier one."""
    seen, waiting = {id(node)}, [node]
    while waiting:
        node = waiting.pop()
        if node is earlier:
            return True
        made = [value.producer() for value in node.inputs if value is not None]
        fresh = [one for one in made if one is not None and id(one) not in seen]
        seen |= {id(one) for one in fresh}
        waiting += fresh
    return False


def _computed(value: ir.Value | None) -> bool:
    """Whether a value is neither a weight nor made only of weights."""
    if value is None or shape_of(value) is not None:
        return False
    node = value.producer()
    return node is None or any(map(_computed, node.inputs))


def _head(model: ir.Model, stream: ir.Value) -> ir.Model | None:
    """Returns the graph from the last stream to the logits, None if it reads anything else."""
    logits = next(value for value in model.graph.outputs if value.name == names.LOGITS)
    try:
        part = ir.convenience.extract(model.graph, [stream], [logits]).clone()
    except ValueError:
        return None
    for value in (*part.inputs, *part.outputs):
        value.shape = None
    return ir.Model(part, ir_version=model.ir_version)


# --- the embedding ------------------------------------------------------------------------------------------------
def _embedded(
    model: ir.Model, flow: _Flow, first: list[ir.Node]
) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """Returns the embedding of the tokens, the positions that are added to it, and the input of the first layer.

    Without positions the first is None: the input is the embedding.
    """
    ids = next(value for value in model.graph.inputs if value.name == names.INPUT_IDS)
    words = next((node for node, _ in ids.uses() if flow.reaches(node)), None)
    if words is None:
        return None, None, None
    way = [words, *_before(flow.chain(words), first)]
    for node in way:
        added = [value for value in node.inputs if value is not None and id(value) not in flow.of_ids]
        if node.op_type == "Add" and added and _computed(added[0]):
            word = next(value for value in node.inputs if value is not added[0])
            return word, added[0], way[-1].outputs[0]
    return None, None, way[-1].outputs[0]
