"""Finds recurrences that LinearAttention computes, by the algebra of their bodies.

A value of a body is a sum of products of the body's inputs, and of the state at most once. Each axis has a label,
and a sum over an axis binds its label. So it does not matter whether a product is written by einsum, by matmul or by
broadcasting and a sum. A state S of keys d and values v, with heads h, obeys a rule of LinearAttention if

    S'[h,d,v] = decay[h,d] S[h,d,v] + key[h,d] beta[h] value[h,v]                                       gated
                - key[h,d] beta[h] sum over e (key[h,e] decay[h,e] S[h,e,v])                            gated delta
    y[h,v]    = sum over d (query[h,d] S'[h,d,v])

Everything else is left to Scan, also a state without an axis of values alone, as that of Mamba 1: with heads of one
channel LinearAttention is 36 times as slow as Scan (16,384 channels, 512 tokens).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..program.distribution import Recurrence, numbers_of
from ..program.op import Op, Size
from ..values import Value
from .products import einsum_letters, matmul_letters

Labels = tuple[int | None, ...]  # one for each axis; None for an axis of size 1
Factors = tuple[tuple[Op, Labels], ...]
Terms = tuple[tuple[int, Factors], ...]  # signs and products
_SAME = ("clone", "contiguous", "detach", "alias")
_VIEWS = ("view", "reshape", "expand", "unsqueeze", "squeeze", "transpose", "permute", "select", "slice", *_SAME)


class _OtherError(Exception):
    """The body computes something else."""


@dataclass(frozen=True)
class LinearRule:
    """The inputs of LinearAttention: products of factors with axes of the labels h (if there are heads), d and v."""

    axes: tuple[int | None, int, int]  # (h, or None without heads; d; v)
    state: Labels  # of the author's state
    query: Factors
    key: Factors
    value: Factors
    decay: Factors
    beta: Factors | None  # of the delta rule
    output: Labels


@dataclass(frozen=True)
class _Sum:
    terms: Terms
    labels: Labels


@functools.lru_cache(maxsize=256)
def linear_rule(loop: Recurrence) -> LinearRule | None:
    """The rule of a recurrence; None if LinearAttention does not compute it."""
    try:
        return _Algebra(loop).rule()
    except _OtherError:
        return None


def product(
    factors: Factors, labels: Sequence[int], sizes: Mapping[int, int], value_of: Callable[[Op], Value]
) -> Tensor:
    """The product of factors as (B, T, ...) or with 1 for B and T, expanded to an axis for each label."""
    found: Tensor = torch.ones(())
    for op, own in factors:
        value = value_of(op).real().explicit()
        tensor = value.tensor if value.lifted else value.tensor[None] if value.batched else value.tensor[None, None]
        kept = [label for label in own if label is not None]
        tensor = tensor.reshape(*tensor.shape[:2], *(sizes[label] for label in kept))
        order = [kept.index(label) for label in labels if label in kept]
        tensor = tensor.permute(0, 1, *(2 + place for place in order))
        for place, label in enumerate(labels):
            tensor = tensor if label in kept else tensor.unsqueeze(2 + place)
        found = found * tensor
    return found


class _Algebra:
    def __init__(self, loop: Recurrence) -> None:
        if len(loop.states) != 1 or len(loop.outputs) != 1:
            raise _OtherError
        self._loop = loop
        self._new = itertools.count()
        self._same: dict[int, int] = {}
        self._known: dict[Op, _Sum] = {}

    def rule(self) -> LinearRule:
        (before, after), (output,) = self._loop.states[0], self._loop.outputs
        self._known[before] = self._symbol(before)
        step = None
        for op in self._loop.body:
            self._known[op] = self._apply(op)
            if op is after:
                step = self._known[op]
                self._known[op] = self._symbol(op)  # a value that is read out of it
        found = self._known.get(output)
        if step is None or output in (before, after) or found is None or len(found.terms) != 1:
            raise _OtherError
        return self._matched(step, before, found, after)

    def _matched(self, step: _Sum, before: Op, read: _Sum, after: Op) -> LinearRule:
        axes = self._roots(step.labels)
        terms = [(sign, *self._split(factors, before)) for sign, factors in step.terms]
        decays = [factors for sign, state, factors in terms if sign > 0 and state == axes]
        updates = [factors for sign, state, factors in terms if sign > 0 and state is None]
        deltas = [(state, factors) for sign, state, factors in terms if sign < 0 and state is not None]
        sign, read_factors = read.terms[0]
        state, query = self._split(read_factors, after)
        if (len(decays), len(updates)) != (1, 1) or len(terms) != 2 + len(deltas) or len(deltas) > 1:
            raise _OtherError
        if state is None or sign < 0 or len({*state}) < len(state) - max(state.count(None) - 1, 0):  # S[d, d]
            raise _OtherError
        labels: dict[int | None, int | None] = dict(zip(state, axes, strict=True))  # of the readout, in the step
        labels[None] = None
        if not {*self._roots(read.labels), *_labels_of(query)} <= {*labels}:
            raise _OtherError  # of other axes than the state's, such as several queries for a head
        query = tuple((op, tuple(labels[label] for label in own)) for op, own in query)
        output = tuple(labels[label] for label in self._roots(read.labels))
        (decay,), (update,) = decays, updates
        steering = _labels_of((*decay, *query))
        summed = [label for label in axes if label is not None and label not in output]
        values = [label for label in axes if label is not None and label in output and label not in steering]
        heads = [label for label in axes if label is not None and label not in (*summed, *values)]
        if len(summed) != 1 or len(values) != 1 or len(heads) > 1:
            raise _OtherError
        d, v = summed[0], values[0]
        key = tuple(one for one in update if d in one[1])
        value = tuple(one for one in update if v in one[1])
        beta = tuple(one for one in update if one not in key and one not in value)
        if not key or not value or {*key} & {*value} or not all(_is_positive(op) for op, _ in decay):
            raise _OtherError
        if v in _labels_of(key) or not _labels_of((*update, *query, *decay)) <= {*axes}:
            raise _OtherError
        named = (heads[0] if heads else None, d, v)
        rule = LinearRule(named, axes, query, key, value, decay, beta, output)
        if not deltas:
            return dataclasses.replace(rule, value=value + beta, beta=None)
        state, factors = deltas[0]
        bound = state[axes.index(d)]
        moved = tuple((op, tuple(bound if label == d else label for label in own)) for op, own in (*decay, *key))
        right = tuple(bound if label == d else label for label in axes) == state and bound not in axes
        if not right or Counter(factors) != Counter((*moved, *key, *beta)):
            raise _OtherError
        return rule

    def _split(self, factors: Factors, state: Op) -> tuple[Labels | None, Factors]:
        """The labels of the state among the factors, if it is there, and the other factors."""
        found = [self._roots(own) for op, own in factors if op is state]
        if len(found) > 1:
            raise _OtherError
        others = tuple((op, self._roots(own)) for op, own in factors if op is not state)
        return (found[0] if found else None), others

    # --- labels
    def _roots(self, labels: Labels) -> Labels:
        return tuple(None if label is None else self._root(label) for label in labels)

    def _root(self, label: int) -> int:
        while label in self._same:
            label = self._same[label]
        return label

    def _joined(self, *labels: int | None) -> int | None:
        """One label for axes that meet."""
        found = {self._root(label) for label in labels if label is not None}
        first = min(found, default=None)
        self._same |= {label: first for label in found if first is not None and label != first}
        return first

    def _symbol(self, op: Op) -> _Sum:
        labels = tuple(None if size == Size(0, 1) else next(self._new) for size in op.shape)
        return _Sum(((1, ((op, labels),)),), labels)

    def _value(self, op: Op) -> _Sum:
        """A value with separate labels for this use."""
        if op not in self._known:
            known = op.depends and not op.timed and (_is_view(op) or _is_outer(op))
            if not known:
                return self._symbol(op)
            self._known[op] = self._apply(op)
        found = self._known[op]
        return self._renamed(found, {*self._roots(found.labels), *_labels_of(f for _, fs in found.terms for f in fs)})

    def _renamed(self, value: _Sum, labels: Iterable[int | None]) -> _Sum:
        names = {self._root(label): next(self._new) for label in labels if label is not None}

        def renamed(own: Labels) -> Labels:
            return tuple(label if label is None else names.get(label, label) for label in self._roots(own))

        terms = tuple((sign, tuple((op, renamed(own)) for op, own in factors)) for sign, factors in value.terms)
        return _Sum(terms, renamed(value.labels))

    # --- operators
    def _apply(self, op: Op) -> _Sum:
        name, args = op.name, op.args
        if name == "einsum":
            return self._product(args[1], einsum_letters(args[0], [len(i.shape) for i in args[1]]))
        if name in ("matmul", "bmm"):
            return self._product(args[:2], matmul_letters(args[0].shape, args[1].shape, op.shape))
        if name in ("mul", "add", "sub") and isinstance(args[0], Op) and isinstance(args[1], Op) and not op.kwargs:
            return self._pointwise(name, self._value(args[0]), self._value(args[1]), len(op.shape))
        if name == "sum" and isinstance(args[0], Op) and len(args) > 1:
            return self._summed(self._value(args[0]), args[1], kept=len(args) > 2 and bool(args[2]))
        if name in _VIEWS and isinstance(args[0], Op):
            return self._viewed(op, self._value(args[0]))
        raise _OtherError

    def _pointwise(self, name: str, a: _Sum, b: _Sum, rank: int) -> _Sum:
        wide = [(*[None] * (rank - len(x.labels)), *x.labels) for x in (a, b)]
        labels = tuple(self._joined(*pair) for pair in zip(*wide, strict=True))
        if name == "mul":
            return _Sum(_multiplied(a.terms, b.terms), labels)
        return _Sum((*a.terms, *((sign if name == "add" else -sign, fs) for sign, fs in b.terms)), labels)

    def _product(self, operands: Sequence[Op], letters: Sequence[str]) -> _Sum:
        values = [self._value(op) for op in operands]
        *own, out = letters
        axes = [
            pair for names, value in zip(own, values, strict=True) for pair in zip(names, value.labels, strict=True)
        ]
        known = {letter: self._joined(*(label for other, label in axes if other == letter)) for letter, _ in axes}
        terms = functools.reduce(_multiplied, (value.terms for value in values))
        found = _Sum(terms, tuple(known[letter] for letter in out))
        return self._bound(found, [label for letter, label in known.items() if letter not in out])

    def _summed(self, x: _Sum, dims: Sequence[int], *, kept: bool) -> _Sum:
        gone = {dim % len(x.labels) for dim in dims}
        bound = [x.labels[i] for i in gone]
        labels = [None if i in gone else label for i, label in enumerate(x.labels) if kept or i not in gone]
        return self._bound(_Sum(x.terms, tuple(labels)), bound)

    def _bound(self, value: _Sum, labels: Iterable[int | None]) -> _Sum:
        """The sum over axes, whose labels are used nowhere else then."""
        roots = {self._root(label) for label in labels if label is not None}
        if any(not roots <= _labels_of((op, self._roots(own)) for op, own in fs) for _, fs in value.terms):
            raise _OtherError
        return self._renamed(value, roots)

    def _viewed(self, op: Op, x: _Sum) -> _Sum:
        if op.name in ("transpose", "permute"):
            rank = len(x.labels)
            order = [*range(rank)] if op.name == "transpose" else [dim % rank for dim in op.args[1]]
            if op.name == "transpose":
                one, other = op.args[1] % rank, op.args[2] % rank
                order[one], order[other] = other, one
            return _Sum(x.terms, tuple(x.labels[i] for i in order))
        if not _is_view(op):
            raise _OtherError
        labels = iter([label for label in x.labels if label is not None])
        return _Sum(x.terms, tuple(None if size == Size(0, 1) else next(labels) for size in op.shape))


def _multiplied(a: Terms, b: Terms) -> Terms:
    return tuple((s * t, (*f, *g)) for s, f in a for t, g in b)


def _is_view(op: Op) -> bool:
    """Whether it orders axes, or adds or removes some of size 1."""
    if op.name not in _VIEWS:
        return False
    wide = [[size for size in one.shape if size != Size(0, 1)] for one in (op, op.inputs[0])]
    return wide[0] == wide[1] or op.name in ("transpose", "permute")


def _is_outer(op: Op) -> bool:
    """Whether it is a product with more numbers than each of its operands, of one token."""
    if not op.depends or op.timed or not op.inputs:
        return False
    if op.name in ("einsum", "matmul", "bmm", "mul") and numbers_of(op) > max(map(numbers_of, op.inputs)):
        return True
    return op.name in ("mul", *_VIEWS) and any(map(_is_outer, op.inputs))


def _labels_of(factors: Iterable[tuple[Op, Labels]]) -> set[int]:
    return {label for _, own in factors for label in own if label is not None}


def _is_positive(op: Op) -> bool:
    """Whether an operator makes positive numbers, which have a logarithm."""
    if op.constant is not None:
        return bool((op.constant > 0).all())
    if op.name in (*_VIEWS, "token_row", "mul"):
        return all(isinstance(i, Op) and _is_positive(i) for i in (op.inputs if op.name == "mul" else op.inputs[:1]))
    return op.name in ("exp", "sigmoid")
