"""The recurrences of followed modules: torch's own layers, sums along the text, and loops over tokens.

Each is a `states.StateCall`. The runtime begins every text with a state of zeros. A recurrence that begins with other
numbers uses them in a run whose first token is at position 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from pastkey.contract import names
from pastkey.contract.bundle import StateGeometry

_FLOAT = 1  # ONNX's element type

# The order of ONNX's gates among torch's: r z n -> z r h, and i f g o -> i o f c.
_GATES: Final = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
Gated = Literal["GRU", "LSTM", "RNN_TANH", "RNN_RELU"]


def _flat(size: int) -> StateGeometry:
    return StateGeometry(names.FLAT_STATE, (size,))


@dataclass(frozen=True)
class GatedCall:
    """One layer of nn.GRU, nn.LSTM or nn.RNN."""

    kind: Gated
    rows: Tensor  # (B, T, F)
    weights: tuple[Tensor, ...]  # torch's: (G H, F), (G H, H), and two biases (G H,) or none, for G gates
    beginning: tuple[Tensor, ...]  # (B, H) h, and c of an LSTM; empty for zeros
    begins: Tensor | None  # (B, 1) whether a row's text begins in this run; None: it does

    @property
    def geometry(self) -> StateGeometry:
        """h, and c of an LSTM."""
        return _flat((1 + (self.kind == "LSTM")) * self.weights[1].shape[1])

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs (B, T, H) and the state (B, H or 2 H), by torch's operator."""
        parts = [part[None].contiguous() for part in self._from(state)]
        function = getattr(torch, self.kind.lower())
        hidden = parts if self.kind == "LSTM" else parts[0]
        weights = list(self.weights)
        output, *ends = function(self.rows, hidden, weights, len(weights) == 4, 1, 0.0, False, False, True)
        return output, torch.cat(ends, 2)[0]

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """ONNX's GRU, LSTM or RNN: https://onnx.ai/onnx/operators/onnx__GRU.html."""
        kind, *activation = self.kind.split("_")
        size = self.weights[1].shape[1]

        def ordered(weight: Tensor) -> Tensor:
            return torch.cat([weight[i * size : (i + 1) * size] for i in _GATES[self.kind]])[None]

        batch, new = self.rows.shape[:2]
        parts = [part[None] for part in self._from(past)]
        bias = torch.cat([ordered(weight) for weight in self.weights[2:]], 1) if len(self.weights) == 4 else None
        matrices = (ordered(weight) for weight in self.weights[:2])
        attributes: dict[str, Any] = {"hidden_size": size} | ({"linear_before_reset": 1} if kind == "GRU" else {})
        output, *ends = torch.onnx.ops.symbolic_multi_out(
            kind,
            (self.rows.transpose(0, 1), *matrices, bias, None, *parts),
            attributes | ({"activations": [activation[0].capitalize()]} if activation else {}),
            dtypes=(_FLOAT,) * (1 + len(parts)),
            shapes=((new, 1, batch, size), *[(1, batch, size)] * len(parts)),
        )
        return output.squeeze(1).transpose(0, 1), torch.cat(ends, 2)[0]

    def _from(self, state: Tensor | None) -> list[Tensor]:
        """The parts (B, H) of the state before the first token."""
        zeros = self.rows.new_zeros(self.rows.shape[0], self.weights[1].shape[1])
        beginning = self.beginning or (zeros,) * (1 + (self.kind == "LSTM"))
        if state is None:
            return [part.expand_as(zeros) for part in beginning]
        parts = state.split(zeros.shape[1], 1)
        if not self.beginning or self.begins is None:
            return list(parts)
        return [torch.where(self.begins, one, part) for one, part in zip(beginning, parts, strict=True)]


@dataclass(frozen=True)
class SumCall:
    """A sum along the text: the state is the last one."""

    rows: Tensor  # (B, T, F)

    @property
    def geometry(self) -> StateGeometry:
        """The sum so far, (F,)."""
        return _flat(self.rows.shape[2])

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sums (B, T, F) and the last one (B, F)."""
        sums = self.rows.cumsum(1)
        sums = sums if state is None else sums + state[:, None]
        return sums, sums[:, -1]

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """The same by ONNX's CumSum."""
        return self.over(past)


@dataclass(frozen=True)
class ShiftCall:
    """Each row one token later: the state is the last row."""

    rows: Tensor  # (B, T, F)

    @property
    def geometry(self) -> StateGeometry:
        """The last row, (F,)."""
        return _flat(self.rows.shape[2])

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows before (B, T, F), behind zeros at the beginning, and the last row (B, F)."""
        first = torch.zeros_like(self.rows[:, 0]) if state is None else state
        rows = torch.cat([first[:, None], self.rows], 1)
        return rows[:, :-1], rows[:, -1]

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """The same."""
        return self.over(past)


Tensors = Sequence[Tensor]
Body = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensor]]


@dataclass(frozen=True)
class LoopCall:
    """Any other recurrence: a body that runs for each token.

    The body gets the parts of the state (B, ...), rows of one token (B, ...) and the fixed tensors. It returns the
    next parts, and its outputs as one row (B, F).
    """

    body: Body
    parts: tuple[Tensor, ...]  # of the state before the first token: zeros (B, ...)
    rows: tuple[Tensor, ...]  # (B, T, ...)
    fixed: tuple[Tensor, ...]  # the same for every token

    @property
    def geometry(self) -> StateGeometry:
        """All parts, one after another."""
        return _flat(sum(part[0].numel() for part in self.parts))

    def over(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The outputs (B, T, F) and the state (B, N), token by token."""
        parts: Tensors = self._from(state)
        outputs = []
        for token in range(self.rows[0].shape[1]):
            parts, output = self.body(parts, [rows[:, token] for rows in self.rows], self.fixed)
            outputs.append(output)
        return torch.stack(outputs, 1), _joined(parts)

    def node(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """ONNX's Scan over the tokens."""
        count, total = len(self.parts), len(self.parts) + len(self.rows)

        def body(*given: Tensor) -> list[Tensor]:
            parts, output = self.body(given[:count], given[count:total], given[total:])
            return [part.clone() for part in (*parts, output)]  # none may be a view of another

        rows = [rows.transpose(0, 1) for rows in self.rows]
        first, fixed = ([tensor.clone() for tensor in given] for given in (self._from(past), self.fixed))
        *parts, outputs = torch.ops.higher_order.scan(body, first, rows, fixed)
        return outputs.transpose(0, 1), _joined(parts)

    def _from(self, state: Tensor | None) -> list[Tensor]:
        if state is None:
            return list(self.parts)
        sizes = [part[0].numel() for part in self.parts]
        flat = zip(self.parts, state.split(sizes, 1), strict=True)
        return [one.reshape(part.shape).to(part.dtype) for part, one in flat]


def _joined(parts: Tensors) -> Tensor:
    """(B, N) float32."""
    flat = [part.reshape(part.shape[0], -1).to(torch.float32) for part in parts]
    return torch.cat(flat, 1) if len(flat) > 1 else flat[0]
