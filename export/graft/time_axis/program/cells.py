"""torch's cells, nn.GRUCell and the like, as the operators that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def _gru_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    reset, update, new = F.linear(x, w_ih, b_ih).chunk(3, 1)
    hidden_reset, hidden_update, hidden_new = F.linear(hx, w_hh, b_hh).chunk(3, 1)
    update = torch.sigmoid(update + hidden_update)
    new = torch.tanh(new + torch.sigmoid(reset + hidden_reset) * hidden_new)
    return (hx - new) * update + new


def _lstm_cell(
    x: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    gates = F.linear(x, w_ih, b_ih) + F.linear(hx[0], w_hh, b_hh)
    into, forget, cell, out = gates.chunk(4, 1)
    kept = torch.sigmoid(forget) * hx[1] + torch.sigmoid(into) * torch.tanh(cell)
    return torch.sigmoid(out) * torch.tanh(kept), kept


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> Tensor:
        b_ih, b_hh = biases or (None, None)
        return activation(F.linear(x, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))

    return cell


CELLS: Final[dict[Any, Callable[..., Any]]] = {
    aten.gru_cell.default: _gru_cell,
    aten.lstm_cell.default: _lstm_cell,
    aten.rnn_tanh_cell.default: _rnn_cell(torch.tanh),
    aten.rnn_relu_cell.default: _rnn_cell(torch.relu),
}
