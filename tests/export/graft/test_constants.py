"""Folding of constants before a program becomes ONNX: values are torch's, and nothing that changes is folded."""

import pytest
import torch
from torch import nn

from pastkey.export.graft.constants import fold_constants


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
