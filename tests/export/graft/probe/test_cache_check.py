"""Whether a cache gives what no cache gives is seen in torch, before anything is traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.export.graft.probe.cache_check import cache_works
from pastkey.export.graft.probe.observe import observe

from ...cases import CASES
from ...decoders import Plain


def works(module: nn.Module, context: int = 20) -> bool:
    return cache_works(module, observe(module, context), context)


@pytest.mark.parametrize("name", CASES)
def test_decoders_of_the_contract_pass(name: str) -> None:
    case = CASES[name]
    assert works(case.build(), case.context)


class Convolution(Plain):
    def more(self) -> None:
        self.mix = nn.Conv1d(32, 32, 3, groups=32)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().embed(input_ids, position_ids)
        return hidden + self.mix(F.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2)


class RunningMean(Plain):
    def logits(self, hidden: Tensor) -> Tensor:
        count = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        return self.head(hidden.cumsum(1) / count)


class TokenShift(Plain):
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        hidden = super().embed(input_ids, position_ids)
        return hidden + F.pad(hidden, (0, 0, 1, 0))[:, :-1]


class IgnoresPositions(Plain):
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position(torch.arange(input_ids.shape[1]))


class Ahead(Plain):
    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits - logits.mean(1, keepdim=True)


class Random(Plain):
    def logits(self, hidden: Tensor) -> Tensor:
        return F.dropout(self.head(hidden))


class TooShort(Plain):
    """Fails where tokens do not begin at position 0."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position.weight[: 2 * input_ids.shape[1] - 1][position_ids]


@pytest.mark.parametrize(
    "build",
    [Convolution, RunningMean, TokenShift, IgnoresPositions, Ahead, Random],
)
def test_what_a_cache_of_keys_and_values_is_not_enough_for_is_seen(build: type[Plain]) -> None:
    module = build()
    assert not works(module)
    assert not any(child._forward_hooks for child in module.modules())


def test_a_failure_beyond_position_0_is_seen() -> None:
    assert not works(TooShort(), context=12)


def test_a_convolution_is_seen_at_the_smallest_context_too() -> None:
    assert not works(Convolution(context=2), context=2)


def test_no_positions_at_all_are_accepted() -> None:
    """Attention that is causal gives order enough; nothing is baked in that a cache would break."""

    class NoPositions(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.token(input_ids)

    assert works(NoPositions())
