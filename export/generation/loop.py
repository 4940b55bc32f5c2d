"""Builds a generation graph from a last-logits graph: one run reads a prompt and settings and returns the new ids.

The decoder's nodes become the body of one Loop. Its first iteration processes the prompt, each further one the previous
token. Nodes that depend only on weights stay outside the Loop, as do the weights, which are stored and prepacked once:
a kernel accepts weights from the directly enclosing scope, but not from further out.

Shapes: T tokens of the prompt, P tokens in the cache, V vocabulary, L attention calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Manifest

from ..graph.edit import drop_unused_weights, replace_uses
from .nodes import Nodes, typed
from .random_stream import uniforms
from .sampler import Settings, choose

# Some kernels need a constant in their own graph, and onnxruntime fuses DequantizeLinear and MatMul into MatMulNBits
# only if DequantizeLinear and its weights are in the MatMul's graph.
_BESIDE = ("Constant", "DequantizeLinear")
_INT64, _FLOAT, _BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL


def why_no_step(manifest: Manifest) -> str | None:
    """Returns why one tensor cannot hold the cache of a decoder, or None if it can."""
    if manifest.rows or manifest.states:
        return "it keeps rows of short convolutions or states as well as keys and values"
    shapes = {
        (layer.kv_heads, size) for layer in manifest.layers for size in (layer.key_head_size, layer.value_head_size)
    }
    if len(shapes) > 1:
        found = ", ".join(f"{heads} heads of {size}" for heads, size in sorted(shapes))
        return f"its keys and values differ in shape from layer to layer ({found})"
    return None


def generate_whole(model: ir.Model, manifest: Manifest, *, step: bool = False) -> None:
    """Turns a last-logits graph into a generation graph, in place.

    Args:
        model: A bundle's graph, with its embedding (`give_embedding_back`).
        manifest: The bundle's.
        step: Whether the cache is an input and an output, so that a further call can continue the generation.
    """
    decoder = _Decoder(model)
    n = Nodes(model, "generate")
    given = {name: typed(name, _INT64, [1]) for name in names.GENERATE_INTEGERS}
    given |= {name: typed(name, _FLOAT, [1]) for name in names.GENERATE_NUMBERS}
    given["end_ids"] = typed("end_ids", _INT64, ["ends"])
    prompt = typed(names.INPUT_IDS, _INT64, [1, "tokens"])
    held_cache, held_ids = _held(decoder) if step else (None, None)
    tokens, held = n.add("Shape", prompt, start=1, end=2), n.number([0])
    ids = n.add("Reshape", prompt, n.number([-1]))
    conditions = [(n.add("Greater", tokens, n.number([0])), "input_ids must hold at least one token")]
    if held_cache is not None and held_ids is not None:
        held = n.add("Shape", held_ids)
        ids = n.add("Concat", held_ids, ids, axis=0)
        fits = n.add("LessOrEqual", held, n.add("Shape", held_cache, start=3, end=4))
        conditions.append((fits, "history must have no more ids than cache has rows"))
    first = n.add("Shape", ids)  # position of the first new token
    # With `step`, a call may follow the last possible token. It returns no token.
    most = manifest.context_length + (1 if step else 0)
    conditions += _conditions(n, ids, first, given, manifest, most)
    ids = functools.reduce(lambda sum_, other: n.add("Add", sum_, other), [ids, *(n.require(*c) for c in conditions)])
    left = n.add("Sub", n.number([manifest.context_length + 1]), first)
    # The last token is never fed, so the text may be one token longer than the context.
    trips = n.add("Max", n.add("Min", given["max_new_tokens"], left), n.number([0]))
    seen = n.add(
        "ScatterElements",
        n.filled(n.number([manifest.vocab_size]), False, np.bool_),
        ids,
        n.filled(first, True, np.bool_),
        axis=0,
    )
    past = _past(n, decoder, held_cache, held)
    body = _body(model, decoder, given, _draws(n, given, first, trips), manifest)
    now = n.add("Unsqueeze", n.add("Slice", ids, held, first), n.number([0]))
    inputs = [n.scalar(trips), None, now, held, seen, *past]
    ends = n.add_several("Loop", len(body.outputs) - 1, *inputs, body=body)
    made = n.add("Reshape", ends[-1], n.number([-1]))
    outputs = [_output(made, names.GENERATED_IDS, _INT64, ["new_tokens"])]
    if held_cache is not None:
        whole = n.add("Concat", *(n.add("Unsqueeze", end, n.number([0])) for end in ends[3:-1]), axis=0)
        outputs.append(_output(whole, names.NEW_CACHE, decoder.dtype, [*_cache_shape(decoder, "tokens_held_then")]))
        said = n.add("Slice", n.add("Concat", ids, made, axis=0), n.number([0]), ends[1])
        outputs.append(_output(said, names.NEW_IDS, _INT64, ["tokens_held_then"]))
    model.graph.extend(n.nodes)
    model.graph.inputs.append(prompt)
    if held_cache is not None and held_ids is not None:
        model.graph.inputs.extend([held_cache, held_ids])
    model.graph.inputs.extend(given[name] for name in (*names.GENERATE_INTEGERS, *names.GENERATE_NUMBERS))
    model.graph.outputs.extend(outputs)
    model.graph.name = "generate"
    drop_unused_weights(model)


def _draws(n: Nodes, given: dict[str, ir.Value], first: ir.Value, trips: ir.Value) -> ir.Value:
    """(N,) float64: the uniform number that draws each token; zeros if decoding is greedy."""
    none = n.filled(trips, 0.0, np.float64)
    none.type, none.shape = ir.TensorType(ir.DataType.DOUBLE), ir.Shape([None])
    greedy = n.add("Equal", n.scalar(given["temperature"]), n.number(0, np.float32))
    places = n.add("Range", n.scalar(first), n.scalar(n.add("Add", first, trips)), n.number(1))
    return n.branch(greedy, lambda _: none, lambda b: uniforms(b, given["seed"], places), of=none)


def _past(n: Nodes, decoder: _Decoder, held_cache: ir.Value | None, held: ir.Value) -> list[ir.Value]:
    """Returns the cache of the first iteration: empty, or the held rows."""
    count = len(decoder.past)
    if held_cache is None:
        return [n.constant(f"empty_{i}", decoder.empty(i)) for i in range(count)]
    kept = n.add("Slice", held_cache, n.number([0]), held, n.number([3]))
    parts = n.add_several("Split", count, kept, axis=0, num_outputs=count)
    return [n.add("Squeeze", part, n.number([0])) for part in parts]


class _Decoder:
    """The inputs, outputs and input-dependent nodes of a last-logits graph, removed from it."""

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.past = [value for name, value in self.inputs.items() if name.startswith("past_")]
        outputs = {str(value.name): value for value in graph.outputs}
        self.logits = outputs[names.LOGITS]
        self.present = [outputs[names.present_of(str(value.name))] for value in self.past]
        dtype = self.past[0].dtype
        assert dtype is not None
        self.dtype = dtype
        graph.inputs.clear()
        graph.outputs.clear()
        self.nodes = [*_dependent(graph, self.inputs.values())]
        graph.remove(self.nodes)

    def empty(self, index: int) -> np.ndarray:
        """An empty past."""
        shape = [1, *(size if isinstance(size, int) else 0 for size in _sizes(self.past[index])[1:])]
        return np.zeros(shape, self.dtype.numpy())


def _sizes(value: ir.Value) -> list[int | None]:
    assert value.shape is not None
    return [size if isinstance(size, int) else None for size in value.shape]


def _dependent(graph: ir.Graph, inputs: Iterable[ir.Value]) -> Iterable[ir.Node]:
    """Yields the nodes that depend on an input, in the graph's order, and those that must stay with them."""
    known = set(inputs)
    for node in graph:
        if any(value in known for value in node.inputs) or node.op_type in _BESIDE:
            known.update(node.outputs)
            yield node


def _body(model: ir.Model, decoder: _Decoder, given: dict[str, ir.Value], u: ir.Value, manifest: Manifest) -> ir.Graph:
    """Builds the body of the Loop: tokens in, the next token out."""
    n = Nodes(model, "step")
    iteration, going = typed("iteration", _INT64, []), typed("going", _BOOL, [])
    now, length = typed("tokens_now", _INT64, [1, None]), typed("length", _INT64, [1])
    seen = typed("seen", _BOOL, [manifest.vocab_size])
    for value in decoder.past:
        value.shape = ir.Shape([1, *_sizes(value)[1:]])
    total = n.add("Add", length, n.add("Shape", now, start=1, end=2))
    steps = n.add("Range", n.scalar(length), n.scalar(total), n.number(1))
    whole = n.cast(total, ir.DataType.INT32)
    fed = {
        names.INPUT_IDS: now,
        names.POSITION_IDS: n.add("Unsqueeze", steps, n.number([0])),
        names.ATTENTION_MASK: n.filled(n.add("Concat", n.number([1]), total, axis=0), 1, np.int64),
        names.SEQLENS_K: n.add("Sub", whole, n.number([1], np.int32)),
        names.TOTAL_SEQUENCE_LENGTH: n.scalar(whole),
        names.EVICTED: n.number([0], np.int32),
        names.LOGITS_START: n.number([-1]),
    }
    for name, value in decoder.inputs.items():
        if value not in decoder.past:
            replace_uses(value, fed[name])
    before, n = n.nodes, Nodes(model, "choose")
    logits = n.add("Reshape", decoder.logits, n.number([-1]))
    if decoder.logits.dtype is not _FLOAT:
        logits = n.cast(logits, _FLOAT)
    total_logit = n.add("ReduceSum", logits, keepdims=1)
    finite = n.add("Equal", n.add("Sub", total_logit, total_logit), n.number([0], np.float32))
    checked = n.require(finite, "the logits are not finite: the weights are damaged, or overflow at this precision")
    settings = Settings(**{name: given[name] for name in ("top_k", *names.GENERATE_NUMBERS)})
    drawn = n.add("Gather", u, n.add("Unsqueeze", iteration, n.number([0])), axis=0)
    token = n.add("Add", choose(n, logits, seen, drawn, settings, manifest.vocab_size), checked)
    seen_then = n.add("ScatterElements", seen, token, n.number([True], np.bool_), axis=0)
    ended = n.add("ReduceSum", n.cast(n.add("Equal", token, given["end_ids"]), _INT64), keepdims=0)
    going_on = n.add("Equal", ended, n.number(0))
    outputs = [
        _output(going_on, "going_on", _BOOL, []),
        _output(n.add("Reshape", token, n.number([1, 1])), "tokens_then", _INT64, [1, None]),
        _output(n.add("Identity", total), "length_then", _INT64, [1]),
        _output(seen_then, "seen_then", _BOOL, [manifest.vocab_size]),
    ]
    for value in decoder.present:
        value.shape = ir.Shape([1, *_sizes(value)[1:]])
    outputs += [*decoder.present, _output(n.add("Identity", token), "token", _INT64, [1])]
    inputs = [iteration, going, now, length, seen, *decoder.past]
    nodes = [*_used(before), *decoder.nodes, *n.nodes]
    beside = {value for node in nodes if node.op_type == "DequantizeLinear" for value in node.inputs}
    moved = [value for value in model.graph.initializers.values() if value in beside]
    for value in moved:
        del model.graph.initializers[str(value.name)]
    return ir.Graph(inputs, outputs, nodes=nodes, initializers=moved, name="step")


def _used(before: list[ir.Node]) -> list[ir.Node]:
    """Drops the nodes that nothing reads: a decoder reads either a mask or lengths."""
    kept: list[ir.Node] = []
    for node in reversed(before):
        if any(output.uses() for output in node.outputs):
            kept.insert(0, node)
        else:
            for place in range(len(node.inputs)):
                node.replace_input_with(place, None)
    return kept


def _output(value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str | None]) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value


def _cache_shape(decoder: _Decoder, held: str) -> list[int | str | None]:
    _, heads, _, size = _sizes(decoder.past[0])
    return [len(decoder.past), 1, heads, held, size]


def _held(decoder: _Decoder) -> tuple[ir.Value, ir.Value]:
    cache = typed(names.HELD_CACHE, decoder.dtype, _cache_shape(decoder, "rows_held"))
    return cache, typed(names.HELD_IDS, _INT64, ["tokens_held"])


def _conditions(
    n: Nodes, ids: ir.Value, first: ir.Value, given: dict[str, ir.Value], manifest: Manifest, most_tokens: int
) -> list[tuple[ir.Value, str]]:
    """The conditions on a call's inputs, each (1,) bool with an error sentence."""
    vocab, context = manifest.vocab_size, manifest.context_length
    outside = n.add("Or", n.add("Less", ids, n.number(0)), n.add("GreaterOrEqual", ids, n.number(vocab)))
    strangers = n.add("ReduceSum", n.cast(outside, _INT64), keepdims=1)
    conditions = [
        (n.add("Equal", strangers, n.number([0])), f"token ids must be 0 to {vocab - 1}"),
        (
            n.add("LessOrEqual", first, n.number([most_tokens])),
            f"the text is longer than the context of {context} tokens",
        ),
    ]
    conditions += [
        (n.add("GreaterOrEqual", given[name], n.number(0)), f"{name} must be 0 or more")
        for name in ("max_new_tokens", "top_k", "seed")
    ]
    for name, least, most, sentence in (
        ("temperature", 0.0, 2.0**127, "a number from 0 to 2**127"),
        ("top_p", 2.0**-149, 1.0, "above 0 and at most 1"),
        ("min_p", 0.0, 1.0, "between 0 and 1"),
        ("repetition_penalty", 2.0**-149, 2.0**127, "above 0 and at most 2**127"),
    ):
        above = n.add("GreaterOrEqual", given[name], n.number(least, np.float32))
        below = n.add("LessOrEqual", given[name], n.number(most, np.float32))
        conditions.append((n.add("And", above, below), f"{name} must be {sentence}"))
    return conditions
