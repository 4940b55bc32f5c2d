"""Weights that are read when an operator needs them: the same numbers wherever a module uses them."""

import pytest
import torch
from torch import nn

from pastkey.export.graft.streamed import Streaming, WrittenError
from pastkey.export.graph.stored import StoredWeights

from ..in_memory import InMemory


class Elsewhere(nn.Module):
    """Uses weights outside of their submodules, and parts and views of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.table = nn.Embedding(16, 32)

    def forward(self, ids):
        x = self.table.weight[ids] + self.second.weight.mean(1)
        x = x @ self.first.weight[8:40].T.contiguous().T.reshape(32, 32) @ self.first.weight.T
        x = nn.functional.linear(x, self.second.weight, self.second.bias) * self.second.weight.view(-1)[3]
        q, k = torch.cat([self.first.weight, self.second.weight.T]).chunk(2)
        return nn.functional.linear(x @ (q - k).T, torch.einsum("ij,kj->ik", self.table.weight, k))


@pytest.mark.parametrize("mapped", [False, True])
def test_weights_are_filled_wherever_they_are_used(mapped):
    torch.manual_seed(0)
    module = Elsewhere()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = module(ids)
        held = {id(parameter): parameter.detach().clone() for parameter in module.parameters()}
        weights = StoredWeights()
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.data = weights.hollow(InMemory(held[id(parameter)], mapped=mapped))
        assert module(ids).isnan().any()
        with Streaming(weights):
            assert torch.equal(module(ids), expected)
            with pytest.raises(WrittenError, match="writes into a weight"):
                module.first.weight.mul_(2)
