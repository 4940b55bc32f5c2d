"""Attention over a latent row, which is cached instead of the keys and values that are linear functions of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...attention import AttentionCall, attend
from ..program.program import Op
from ..values import NEW, Value


@dataclass(frozen=True)
class Latent:
    """A row of each token that is cached instead of keys and values, which are linear functions of it.

    q · (W row) = (Wᵀ q) · row, and Σ p (W row) = W Σ p row. So the queries are multiplied by Wᵀ, the result by W, and
    no key or value is computed. The matrices are constants of the decoder: "key" and "value" (K, 1, D, channels),
    "output" (K, 1, channels, Dv) and "output_bias" (K, 1, 1, Dv).
    """

    sources: tuple[Op, ...]  # their channels, one after another, are the row
    between: tuple[Op, ...]  # the operators from the sources to keys and values, which no step runs
    order: tuple[int, ...] | None  # of the row's channels, if it differs
    key_size: int  # the first channels of the row are cached as the key, the others as the value
    shared: Literal["none", "value", "row"]  # as in AttentionCall
    # For key and value: the first and last channel of the queries that meet it, and whether a matrix multiplies them.
    queries: tuple[tuple[int, int, bool], ...]
    output: bool  # whether the constant "output" multiplies the result
    bias: bool  # whether "output_bias" is added to it


def attend_latent(
    latent: Latent,
    sources: Sequence[Value],
    query: Tensor,  # (B, H, T, D)
    constant: Callable[[str], Tensor],
    form: Mapping[str, Any],  # of the AttentionCall
) -> Tensor:
    """Attention (B, H, T, Dv) over the row."""
    row = torch.cat([row_of(source) for source in sources], 2)[:, None]  # (B, 1, T, channels)
    if latent.order is not None:
        row = row.index_select(3, torch.tensor(latent.order))
    parts = []
    for (first, last, multiplied), kind in zip(latent.queries, ("key", "value"), strict=False):
        part = query[..., first:last]
        parts.append(_by_head(part, constant(kind)) if multiplied else part)
    output = attend(
        AttentionCall(
            query=torch.cat(parts, -1) if len(parts) > 1 else parts[0],
            key=row[..., : latent.key_size],
            value=row[..., latent.key_size :],
            shared=latent.shared,
            **form,
        )
    )
    if latent.output:
        output = _by_head(output, constant("output"))
    if latent.bias:
        bias = constant("output_bias")
        output = (output.unflatten(1, (bias.shape[0], -1)) + bias).flatten(1, 2)
    return output


def _by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, H, T, D) times the matrix (K, 1, D, E) of each key/value head."""
    if len(matrix) == x.shape[1]:
        return x @ matrix[:, 0]
    grouped: Tensor = x.unflatten(1, (matrix.shape[0], -1))
    return (grouped @ matrix).flatten(1, 2)


def row_of(value: Value) -> Tensor:
    """The numbers of each new token, expanded axes once: (B, T, channels)."""
    return value.tensor.movedim(value.dim(value.time_axes(NEW)[0]), 1)[..., None].flatten(2)
