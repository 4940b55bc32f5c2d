"""State beside attention's is refused in torch, before anything is traced, with the submodule that keeps it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.errors import ContractError
from pastkey.export.observe import observe
from pastkey.export.rehearse import rehearse

from .cases import CASES
from .decoders import Plain


def refusal(module: nn.Module, context: int = 20) -> str:
    observation = observe(module, context)
    with pytest.raises(ContractError) as caught:
        rehearse(module, observation, context)
    assert not any(child._forward_hooks for child in module.modules())
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_decoders_of_the_contract_pass(name: str) -> None:
    case = CASES[name]
    module = case.build()
    rehearse(module, observe(module, case.context), case.context)


class Convolution(Plain):
    def more(self) -> None:
        self.mix = nn.Conv1d(32, 32, 3, groups=32)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().embed(input_ids, position_ids)
        return hidden + self.mix(F.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2)


class Recurrence(Plain):
    def more(self) -> None:
        self.memory = nn.GRU(32, 32, batch_first=True)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.memory(super().embed(input_ids, position_ids))[0]


class RunningMean(Plain):
    def logits(self, hidden: Tensor) -> Tensor:
        count = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        return self.head(hidden.cumsum(1) / count)


class TokenShift(Plain):
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().embed(input_ids, position_ids)
        return hidden + F.pad(hidden, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(
    ("build", "culprit"),
    [(Convolution, "mix (Conv1d)"), (Recurrence, "memory (GRU)"), (RunningMean, "head (Linear)"), (TokenShift, None)],
)
def test_state_across_positions_is_refused_with_its_submodule(build: type[Plain], culprit: str | None) -> None:
    sentence = refusal(build())
    assert "keeps state across positions outside attention (a convolution, recurrence or running sum)" in sentence
    if culprit:
        assert sentence.startswith(culprit)


def test_convolution_is_refused_at_the_smallest_context_too() -> None:
    assert "keeps state across positions" in refusal(Convolution(context=2), context=2)


class IgnoresPositions(Plain):
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position(torch.arange(input_ids.shape[1]))


def test_ignored_position_ids_are_refused_by_name() -> None:
    sentence = refusal(IgnoresPositions())
    assert "IgnoresPositions ignores position_ids" in sentence
    assert "self.position_embedding(position_ids), not torch.arange(T)" in sentence


def test_positions_taken_half_from_elsewhere_are_refused() -> None:
    class Half(IgnoresPositions):
        def turn(self, heads: Tensor, position_ids: Tensor) -> Tensor:
            return heads * (1 + 0.1 * position_ids[:, None, :, None])

    sentence = refusal(Half())
    assert "takes positions from elsewhere than position_ids" in sentence


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits - logits.mean(1, keepdim=True),
        lambda logits: logits.flip(1),
        lambda logits: F.layer_norm(logits.transpose(1, 2), (logits.shape[1],)).transpose(1, 2),
    ],
    ids=["mean", "reversed", "normalised_over_the_sequence"],
)
def test_looking_ahead_outside_attention_is_refused(change: object) -> None:
    class Ahead(Plain):
        def logits(self, hidden: Tensor) -> Tensor:
            return change(self.head(hidden))

    assert "looks ahead somewhere outside its attention calls" in refusal(Ahead())


@pytest.mark.parametrize(
    "change", [F.dropout, lambda logits: logits + torch.randn_like(logits) * 0.1], ids=["dropout", "noise"]
)
def test_randomness_outside_training_is_refused(change: object) -> None:
    class Random(Plain):
        def logits(self, hidden: Tensor) -> Tensor:
            return change(self.head(hidden))

    assert "Random gives other logits each time it is run" in refusal(Random())


def test_no_positions_at_all_are_accepted() -> None:
    """Attention that is causal gives order enough; nothing is baked in that a cache would break."""

    class NoPositions(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.token(input_ids)

    module = NoPositions()
    rehearse(module, observe(module, 20), 20)


def test_a_failure_beyond_position_0_is_told_with_its_line() -> None:
    class Short(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.token(input_ids) + self.position.weight[: 2 * input_ids.shape[1] - 1][position_ids]

    sentence = refusal(Short(), context=12)
    assert "fails on tokens that do not begin at position 0, at test_rehearse.py:" in sentence
    assert "take position_ids as they are" in sentence
