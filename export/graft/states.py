"""Calls that keep a state of one size, whatever the length of the text.

Here are those of transformers' models, convolutions and linear recurrences. `recurrences.py` has those of followed
modules.

A state is an input and an output of the graph, as keys and values are. Each call gives its shape, its computation in
torch (`over`, the reference), and the node that computes it in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pastkey.contract import names
from pastkey.contract.bundle import StateGeometry
from pastkey.errors import ContractError

_OPERATORS = "com.microsoft"
_FLOAT = 1  # ONNX's element type


class StateError(ContractError):
    """A recurrence that the graft knows, with something that it does not know. Following would unroll it."""


class StateCall(Protocol):
    """A call that reads the state behind the earlier tokens, and returns the one behind the new tokens."""

    @property
    def geometry(self) -> StateGeometry:
        """The state's kind and its shape for one sequence."""

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs and the next state in torch; `state` is None at the beginning of the text."""

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """The same in a graph, where `past` is zeros at the beginning."""


StateHandler = Callable[[StateCall], Tensor]


@dataclass(frozen=True)
class ConvolutionCall:
    """A causal convolution of each channel along the time axis, behind zeros at the beginning of the text."""

    rows: Tensor  # (B, C, T)
    weight: Tensor  # (C, K)
    bias: Tensor | None  # (C,)
    silu: bool  # whether SiLU follows

    @property
    def geometry(self) -> StateGeometry:
        """The last columns that came in, (C, K - 1)."""
        return StateGeometry(names.CONV_STATE, (self.weight.shape[0], self.weight.shape[1] - 1))

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs (B, C, T) and the state (B, C, K - 1) behind them."""
        kept = self.weight.shape[1] - 1
        past = self.rows.new_zeros(*self.rows.shape[:2], kept) if state is None else state
        columns = torch.cat([past.to(self.rows.dtype), self.rows], 2)
        output = F.conv1d(columns, self.weight[:, None], self.bias, groups=self.weight.shape[0])
        return F.silu(output) if self.silu else output, columns[:, :, columns.shape[2] - kept :]

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """CausalConvWithState, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md."""
        output, present = torch.onnx.ops.symbolic_multi_out(
            f"{_OPERATORS}::CausalConvWithState",
            (self.rows, self.weight[:, None], self.bias, past),
            {"activation": "silu" if self.silu else "none"},
            dtypes=(_FLOAT, _FLOAT),
            shapes=(self.rows.shape, past.shape),
            version=1,
        )
        return output, present


@dataclass(frozen=True)
class RecurrenceCall:
    """A linear recurrence over a matrix per head: S = exp(decay) S + key x update, output = scale * query S.

    The update is `value`, or beta (value - key S) by the delta rule. Fewer heads of queries and keys serve consecutive
    heads of values.
    """

    query: Tensor  # (B, T, Hk, D)
    key: Tensor  # (B, T, Hk, D)
    value: Tensor  # (B, T, H, Dv)
    decay: Tensor  # (B, T, H), or (B, T, H, D) for each channel of the keys; a logarithm
    beta: Tensor | None  # (B, T, H), of the delta rule
    scale: float

    @property
    def geometry(self) -> StateGeometry:
        """S, (H, D, Dv)."""
        sizes = (self.value.shape[2], self.key.shape[3], self.value.shape[3])
        return StateGeometry(names.RECURRENT_STATE, sizes)

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs (B, T, H, Dv) and the state (B, H, D, Dv) behind them, token by token."""
        batch, new, heads = self.value.shape[:3]
        query, key = (t.repeat_interleave(heads // t.shape[2], 2) for t in (self.query * self.scale, self.key))
        decay = (self.decay if self.decay.dim() == 4 else self.decay[..., None]).exp()[..., None]
        if state is None:
            state = self.value.new_zeros(batch, heads, key.shape[3], self.value.shape[3])
        outputs = []
        for t in range(new):
            state, update = state * decay[:, t], self.value[:, t]
            if self.beta is not None:
                update = self.beta[:, t, :, None] * (update - torch.einsum("bhk,bhkv->bhv", key[:, t], state))
            state = state + key[:, t, :, :, None] * update[:, :, None]
            outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
        return torch.stack(outputs, 1), state

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """LinearAttention, of the same document. Its kernel reads shared heads of queries and keys in place."""
        flat: list[Any] = [
            None if t is None else t.flatten(2) if t.dim() == 4 else t
            for t in (self.query, self.key, self.value, self.decay, self.beta)
        ]
        output, present = torch.onnx.ops.symbolic_multi_out(
            f"{_OPERATORS}::LinearAttention",
            (*flat[:3], past, *flat[3 : 4 + (self.beta is not None)]),
            {
                "q_num_heads": self.query.shape[2],
                "kv_num_heads": self.value.shape[2],
                "scale": self.scale,
                "update_rule": "gated" if self.beta is None else "gated_delta",
            },
            dtypes=(_FLOAT, _FLOAT),
            shapes=(flat[2].shape, past.shape),
            version=1,
        )
        return output.unflatten(2, tuple(self.value.shape[2:])), present
