"""torch's cells, nn.GRUCell and the like, and F.cosine_similarity, as the operators that they are made of."""

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


def _of_one_token(cell: Callable[..., Any]) -> Callable[..., Any]:
    """nn.GRU and its like on a single token, in a loop over tokens: a cell for each layer."""

    def layers(
        x: Tensor,
        hidden: Any,
        weights: Sequence[Tensor],
        biased: bool,
        count: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        time, each = int(batch_first), 4 if biased else 2
        if x.shape[time] != 1 or bidirectional or (train and dropout) or len(weights) != count * each:
            return NotImplemented
        parts = hidden if isinstance(hidden, list | tuple) else [hidden]
        y, ends = x.squeeze(time), []
        for layer in range(count):
            states = [part[layer] for part in parts]
            own = weights[layer * each : (layer + 1) * each]
            made = cell(y, states if len(parts) > 1 else states[0], *own)
            ends.append(made if isinstance(made, tuple) else (made,))
            y = ends[-1][0]
        return y.unsqueeze(time), *(torch.stack(part) for part in zip(*ends, strict=True))

    return layers


def _cosine_similarity(a: Tensor, b: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    one, other = (x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps) for x in (a, b))
    product: Tensor = one * other
    return product.sum(dim)


CELLS: Final[dict[Any, Callable[..., Any]]] = {
    aten.cosine_similarity.default: _cosine_similarity,
    aten.gru_cell.default: _gru_cell,
    aten.lstm_cell.default: _lstm_cell,
    aten.rnn_tanh_cell.default: _rnn_cell(torch.tanh),
    aten.rnn_relu_cell.default: _rnn_cell(torch.relu),
    aten.gru.input: _of_one_token(_gru_cell),
    aten.lstm.input: _of_one_token(_lstm_cell),
    aten.rnn_tanh.input: _of_one_token(_rnn_cell(torch.tanh)),
    aten.rnn_relu.input: _of_one_token(_rnn_cell(torch.relu)),
}
