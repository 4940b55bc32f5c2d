"""Weights before a program becomes ONNX: constants are folded, and stored weights are read when they are needed."""

import pytest
import torch
from torch import nn

from pastkey.export.graft.constants import fold_constants
from pastkey.export.graft.streamed import Streaming, WrittenError
from pastkey.export.graph.stored import StoredWeights

from ..in_memory import InMemory


# --- constants --------------------------------------------------------------------------------------------------------
def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


class Quantile(nn.Module):
    """Scales by a quantile of the normal distribution: erfinv of constants, for which ONNX has no operator."""

    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.tensor([0.25, 0.5]))
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        quantile = torch.distributions.Normal(0, 1).icdf(torch.tensor(0.95))
        return x * quantile + torch.special.erfinv(self.get_buffer("share")) * self.weight


class Counting(nn.Module):
    """Changes its constant in place."""

    def forward(self, x):
        total = torch.tensor([0.0, 0.5])
        total += x
        return total.erfinv() * torch.tensor(0.5).erfinv()


def test_what_depends_on_constants_alone_is_computed_before_it_becomes_onnx():
    module, x = Quantile().eval(), torch.tensor([[1.0, 2.0]])
    program = torch.export.export(module, (x,))
    assert any("erfinv" in name for name in operators(program))
    assert fold_constants(program)
    assert not any("erfinv" in name for name in operators(program))
    assert torch.equal(program.module()(x), module(x))
    assert "weight" in program.state_dict  # not folded


def test_a_program_that_changes_a_constant_stays_as_it_is():
    x = torch.tensor([0.1, 0.2])
    program = torch.export.export(Counting().eval(), (x,))
    before = operators(program)
    assert not fold_constants(program)
    assert operators(program) == before
    assert torch.equal(program.module()(x), Counting()(x))


@pytest.mark.filterwarnings("ignore")
def test_a_program_without_constants_has_nothing_to_fold():
    program = torch.export.export(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    assert not fold_constants(program)


# --- weights that are read when an operator needs them ----------------------------------------------------------------
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
