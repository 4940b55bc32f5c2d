"""The optimizers, their rates, and the state that goes into a checkpoint."""

from __future__ import annotations

import pytest
import torch

from pastkey.errors import IntegrityError
from pastkey.train.model import Decoder
from pastkey.train.optimizer import (
    Muon,
    make_optimizers,
    moment_names,
    moments_of,
    orthogonal,
    restore_moments,
    schedule,
)

from .helpers import tiny


def decoder(preset: str = "llama") -> Decoder:
    torch.manual_seed(0)
    return Decoder(tiny(preset=preset).model_config(9, None, 0))


def test_the_learning_rate_warms_up_and_falls():
    config = tiny(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [schedule(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == max(rates) == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.05 <= rates[-1] < 0.06
    short = tiny(steps=20, warmup_steps=10, learning_rate=1.0)  # at most a quarter
    assert [schedule(short, step) for step in (3, 5)] == pytest.approx([0.8, 1.0])


def test_only_projections_decay():
    model = decoder("gpt2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (optimizer,) = make_optimizers(model, tiny(weight_decay=0.5, learning_rate=0.1, optimizer="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        share = 0.95 if name.endswith("proj.weight") else 1.0
        assert torch.allclose(parameter, share * before[name]), name


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 16), (2, 16, 5)])
def test_singular_values_become_about_one(shape):
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_takes_the_matrices_of_projections_alone():
    model = decoder()
    adamw, muon = make_optimizers(model, tiny())
    named = {parameter: name for name, parameter in model.named_parameters()}
    matrices, others = (
        [named[parameter] for group in one.param_groups for parameter in group["params"]] for one in (muon, adamw)
    )
    assert isinstance(muon, Muon)
    assert matrices
    assert all(name.endswith("proj.weight") for name in matrices)
    assert sorted([*matrices, *others]) == sorted(named.values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_restored_moments_give_the_same_steps(optimizer):
    config, ids = tiny(optimizer=optimizer), torch.tensor([[1, 2, 3]])
    first, second = decoder(), decoder()
    optimizers = make_optimizers(first, config)

    def step(model: Decoder, its: list[torch.optim.Optimizer]) -> None:
        model(ids, torch.arange(3)[None]).square().sum().backward()
        for one in its:
            one.step()
            one.zero_grad()

    step(first, optimizers)
    second.load_state_dict(first.state_dict())
    restored = make_optimizers(second, config)
    moments = moments_of(optimizers, first)
    assert {name.rpartition(".")[2] for name in moments} == {name for one in optimizers for name in moment_names(one)}
    restore_moments(restored, second, {name: moment.clone() for name, moment in moments.items()}, 1)
    for other in ({}, {name: moment[:1] for name, moment in moments.items()}):
        with pytest.raises(IntegrityError, match="the checkpoint's optimizer has no"):
            restore_moments(make_optimizers(second, config), second, other, 1)
    for model, its in ((first, optimizers), (second, restored)):
        step(model, its)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
