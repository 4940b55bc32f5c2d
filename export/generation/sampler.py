"""The sampler of `pastkey.runtime.sampling.sampler` as nodes, in the same order and with the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .nodes import Made, Nodes

_DOUBLE = ir.DataType.DOUBLE


@dataclass(frozen=True)
class Settings:
    """The settings of a call as inputs of the graph: each (1,), float32 except `top_k`, int64."""

    temperature: ir.Value
    top_k: ir.Value
    top_p: ir.Value
    min_p: ir.Value
    repetition_penalty: ir.Value


def choose(n: Nodes, logits: ir.Value, seen: ir.Value, u: ir.Value, settings: Settings, vocab_size: int) -> ir.Value:
    """Chooses the next token, (1,) int64.

    Args:
        n: Receives the nodes.
        logits: (V,) float32.
        seen: (V,) bool, whether a token is in the text so far.
        u: (1,) float64, the uniform number that draws the token.
        settings: The call's.
        vocab_size: V.
    """
    token = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    plain = _holds(n, "Equal", settings.repetition_penalty, 1.0)

    def scores(b: Nodes) -> ir.Value:
        wide = b.cast(logits, _DOUBLE)
        wide.type, wide.shape = ir.TensorType(_DOUBLE), ir.Shape([vocab_size])
        return b.branch(plain, lambda _: wide, lambda c: _penalise(c, wide, seen, settings), of=wide)

    def largest(b: Nodes, scores: ir.Value) -> ir.Value:
        return b.add("ArgMax", scores, axis=0, keepdims=1)

    return n.branch(
        _holds(n, "Equal", settings.temperature, 0.0),
        lambda b: b.branch(plain, lambda c: largest(c, logits), lambda c: largest(c, scores(c)), of=token),
        lambda b: _draw(b, scores(b), u, settings, vocab_size),
        of=token,
    )


def _holds(n: Nodes, operator: str, setting: ir.Value, number: float) -> ir.Value:
    """Compares a setting (1,) float32 with a number. Returns () bool."""
    return n.add(operator, n.scalar(setting), n.number(number, np.float32))


def _penalise(n: Nodes, scores: ir.Value, seen: ir.Value, settings: Settings) -> ir.Value:
    penalty = n.cast(settings.repetition_penalty, _DOUBLE)
    positive = n.add("Greater", scores, n.number(0, np.float64))
    changed = n.add("Where", positive, n.add("Div", scores, penalty), n.add("Mul", scores, penalty))
    return n.add("Where", seen, changed, scores)


def _draw(n: Nodes, scores: ir.Value, u: ir.Value, settings: Settings, vocab_size: int) -> ir.Value:
    distance = n.add("Sub", scores, n.add("ReduceMax", scores, keepdims=1))
    x = n.add("Div", distance, n.cast(settings.temperature, _DOUBLE))
    k = n.scalar(settings.top_k)
    fewer = n.add("And", n.add("Greater", k, n.number(0)), n.add("Less", k, n.number(vocab_size)))
    below, above = _holds(n, "Less", settings.top_p, 1.0), _holds(n, "Greater", settings.min_p, 0.0)
    stages: list[tuple[ir.Value, Callable[[Nodes, ir.Value], ir.Value]]] = [
        (fewer, lambda b, x: _keep_top_k(b, x, settings.top_k)),
        (below, lambda b, x: _keep_top_p(b, x, settings, vocab_size)),
        (above, lambda b, x: _keep_min_p(b, x, settings)),
    ]
    for condition, keep in stages:
        x = n.branch(condition, _given(keep, x), _given(lambda _, x: x, x), of=scores)
    sums = n.add("CumSum", n.add("Softmax", x, axis=0), n.number(0))
    last = n.add("Gather", sums, n.number([vocab_size - 1]), axis=0)
    passed = n.add("LessOrEqual", n.add("Div", sums, last), u)
    return n.add("ReduceSum", n.cast(passed, ir.DataType.INT64), keepdims=1)


def _given(made: Callable[[Nodes, ir.Value], ir.Value], x: ir.Value) -> Made:
    return lambda n: made(n, x)


def _keep_top_k(n: Nodes, x: ir.Value, k: ir.Value) -> ir.Value:
    largest, _ = n.add_several("TopK", 2, x, k, axis=0, largest=1, sorted=1)
    return _keep(n, n.add("GreaterOrEqual", x, n.add("ReduceMin", largest, keepdims=1)), x)


def _keep_top_p(n: Nodes, x: ir.Value, settings: Settings, vocab_size: int) -> ir.Value:
    p, probabilities = n.cast(settings.top_p, _DOUBLE), n.add("Softmax", x, axis=0)
    # Tokens of probability below (1 - p) / V have less than 1 - p together. The others reach p and are few to sort.
    rest = n.add("Sub", n.number(1, np.float64), p)
    likely = n.add("GreaterOrEqual", probabilities, n.add("Div", rest, n.number(vocab_size, np.float64)))
    candidates = n.add("Reshape", n.add("NonZero", likely), n.number([-1]))
    # Sort by x: the probabilities of equal x may differ in the last bit, depending on where a kernel's vectors end.
    few = n.add("Gather", x, candidates, axis=0)
    _, order = n.add_several("TopK", 2, few, n.add("Shape", few), axis=0, largest=1, sorted=1)
    ordered = n.add("Gather", n.add("Gather", probabilities, candidates, axis=0), order, axis=0)
    before = n.add("CumSum", ordered, n.number(0), exclusive=1)
    chosen = n.add("Gather", candidates, n.add("Compress", order, n.add("Less", before, p), axis=0), axis=0)
    none = n.filled(n.number([vocab_size]), False, np.bool_)
    kept = n.add("ScatterElements", none, chosen, n.filled(n.add("Shape", chosen), True, np.bool_), axis=0)
    return _keep(n, kept, x)


def _keep_min_p(n: Nodes, x: ir.Value, settings: Settings) -> ir.Value:
    share = n.add("Log", n.cast(settings.min_p, _DOUBLE))
    return _keep(n, n.add("GreaterOrEqual", x, n.add("Add", n.add("ReduceMax", x, keepdims=1), share)), x)


def _keep(n: Nodes, kept: ir.Value, x: ir.Value) -> ir.Value:
    return n.add("Where", kept, x, n.number(-np.inf, np.float64))
