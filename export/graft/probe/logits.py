"""Finds the logits in the result of a call."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

_SUM = 1e-3  # how far a row of probabilities may be from 1


def logits_in(
    outputs: Sequence[list[tuple[str, Tensor]]], lengths: Sequence[int], batch: int, one_row: bool, vocab: int
) -> list[tuple[str, str]]:
    """The parts of a result that may be the logits: suffixes of the expression, each with the order of its axes.

    A part named "logits" comes before all others, then one whose name contains it and whose width is the vocabulary,
    one of that width, one whose name contains it, any other.

    Args:
        outputs: The tensors of the result at both lengths, with their paths.
        lengths: Tokens of both runs.
        batch: B of both runs.
        one_row: Whether the call passes only one row.
        vocab: How many tokens the module embeds.
    """
    found: list[tuple[tuple[bool, ...], str, str]] = []
    for (path, first), (_, second) in zip(*outputs, strict=False):
        shapes = [tuple(first.shape), tuple(second.shape)]
        if not first.is_floating_point() or not all(shapes) or shapes[0][-1] != shapes[1][-1]:
            continue
        order = _order(shapes, lengths, one_row, batch)
        if order is not None:
            wide, named = shapes[0][-1] == vocab, "logits" in path
            rank = (re.search(r"\blogits\b", path) is not None, wide and named, wide, named)
            found.append((rank, path, order))
    best = max((rank for rank, _, _ in found), default=())
    if not any(best) and vocab != batch and any(vocab in _constant(*both) for both in zip(*outputs, strict=False)):
        return []  # another part has the vocabulary's width, along another axis
    return [(path, order) for rank, path, order in found if rank == best]


def _constant(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> list[int]:
    """The sizes of a part that are the same at both lengths."""
    return [a for a, b in zip(first[1].shape, second[1].shape, strict=False) if a == b]


def tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a result, with its path as a suffix of the expression."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors(value, f"{path}[{key!r}]")
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        for name in output._fields:
            yield from tensors(getattr(output, name), f"{path}.{name}")
    elif isinstance(output, list | tuple):
        for i, value in enumerate(output):
            yield from tensors(value, f"{path}[{i}]")
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors(getattr(output, field.name), f"{path}.{field.name}")
    elif hasattr(output, "logits") and isinstance(output.logits, Tensor):
        yield f"{path}.logits", output.logits


def _order(shapes: Sequence[tuple[int, ...]], lengths: Sequence[int], one_row: bool, batch: int) -> str | None:
    """The axes of (..., V), from the shapes at two lengths; None if they do not match."""
    heads = [shape[:-1] for shape in shapes]
    known: dict[str, Callable[[int], tuple[int, ...]]] = {
        "btv": lambda n: (batch, n),
        "tbv": lambda n: (n, batch),
        "bv": lambda n: (batch,),
        "b1v": lambda n: (batch, 1),
    }
    if one_row:
        known |= {"tv": lambda n: (n,), "v": lambda n: (), "1tv": lambda n: (1, n)}
    for order, expected in known.items():
        if all(head == expected(n) for head, n in zip(heads, lengths, strict=True)):
            return order
    return None


def standing(logits: Tensor, order: str) -> Tensor:
    """The logits as (B, T, V) or (B, 1, V); B is 1 for a call that accepts one row only."""
    logits = logits.float()
    if order == "tbv":
        return logits.transpose(0, 1)
    if order in ("tv", "v"):
        logits = logits[None]
    return logits if logits.dim() == 3 else logits[:, None]


def is_distribution(logits: Tensor) -> bool:
    """Whether rows (..., V) hold probabilities, as of a softmax."""
    return bool((logits >= 0).all() and ((logits.sum(-1) - 1).abs() < _SUM).all())
