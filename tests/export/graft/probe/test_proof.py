"""Whether a cache gives what the author's call gives is seen in torch, before anything is traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.export.graft.probe import proof as proof_module
from pastkey.export.graft.probe.call import CONTRACT, Call
from pastkey.export.graft.probe.observe import observe
from pastkey.export.graft.probe.proof import SHORTEST, Proof, prove

from ...cases import CASES
from ...decoders import Plain


def proved(module: nn.Module, context: int = 40) -> Proof:
    module.eval()
    return prove(module, module, Call(CONTRACT), observe(module, context), context, brief=False)


def works(module: nn.Module, context: int = 20) -> bool:
    return not proved(module, context).differs


@pytest.mark.parametrize("name", CASES)
def test_decoders_of_the_contract_pass(name):
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
def test_what_a_cache_of_keys_and_values_is_not_enough_for_is_seen(build):
    module = build()
    assert not works(module)
    assert not any(child._forward_hooks for child in module.modules())


def test_a_failure_beyond_position_0_is_seen():
    with pytest.raises(IndexError):
        works(TooShort(), context=12)


def test_a_convolution_is_seen_at_the_smallest_context_too():
    assert not works(Convolution(context=2), context=2)


def test_no_positions_at_all_are_accepted():
    """Attention that is causal gives order enough; nothing is baked in that a cache would break."""

    class NoPositions(Plain):
        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.token(input_ids)

    assert works(NoPositions())


# --- lengths and contents that random short texts do not show ------------------------------------------------------
class Scaled(Plain):
    """Moves the embeddings by a number of the whole text (B,)."""

    factor: Callable[[Tensor, Tensor], Tensor]

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        moved = (type(self).factor(input_ids, position_ids) - 1)[:, None, None]
        return super().embed(input_ids, position_ids) + moved * torch.linspace(-1, 1, self.width)


def scaled(factor: Callable[[Tensor, Tensor], Tensor]) -> type[Scaled]:
    return type("Scaled", (Scaled,), {"factor": staticmethod(factor)})


def any_flagged(ids: Tensor, _: Tensor) -> Tensor:
    flags = torch.zeros(5000, dtype=torch.bool)
    flags[4321] = True
    return torch.where(flags[ids].any(1), 1.5, 1.0)


OF_LENGTH = {
    "base_by_the_last_position": (lambda ids, at: torch.where(at.amax(1) < 30, 1.0, 1.1), 31),
    "tokens_beyond_a_number": (lambda ids, _: 1 + 0.01 * (torch.ones_like(ids).sum(1) - 20).clamp(min=0), 21),
    "one_token": (lambda ids, _: torch.full((len(ids),), 2.0 if ids.shape[1] == 1 else 1.0), 2),
    "one_length_alone": (lambda ids, at: torch.where(at.amax(1) == 24, 1.5, 1.0), 25),
    "every_eighth": (lambda ids, at: torch.where(at.amax(1) % 8 == 5, 1.5, 1.0), 6),
}


@pytest.mark.parametrize("name", OF_LENGTH)
def test_numbers_that_depend_on_the_length_are_seen_with_the_shortest_text(name):
    factor, shortest = OF_LENGTH[name]
    proof = proved(scaled(factor)())
    assert (proof.longest, proof.differs) == (40, shortest)
    assert proof.off > 1e-3


def flagged_first(ids: Tensor, _: Tensor) -> Tensor:
    flags = torch.zeros(5000, dtype=torch.bool)
    flags[4321] = True
    return torch.where(flags[ids[:, 0]], 1.5, 1.0)


def counted(ids: Tensor, _: Tensor) -> Tensor:
    counts = torch.zeros(len(ids), 5000).scatter_add(1, ids, torch.ones(ids.shape))
    return torch.where(counts[:, 4321] > 0, 1.5, 1.0)


def multiplied(ids: Tensor, _: Tensor) -> Tensor:
    hits = (ids == 4321).float()[:, None, :] @ torch.ones(len(ids), ids.shape[1], 1)
    return 1 + hits[:, 0, 0]


def one_of_nine(ids: Tensor, _: Tensor) -> Tensor:
    hits = [(ids == number).any(1) * (number == 4321) for number in (*range(10, 90, 10), 4321)]
    return 1 + torch.stack(hits).sum(0)


OF_CONTENT = {
    "the_first_token": lambda ids, _: torch.where(ids[:, 0] == 4321, 1.5, 1.0),
    "a_flagged_first_token": flagged_first,
    "the_last_token": lambda ids, _: torch.where(ids[:, -1] == 4321, 1.5, 1.0),
    "a_count_of_each_token": counted,
    "a_product": multiplied,
    "the_ninth_number": one_of_nine,
    "a_rare_token": lambda ids, _: torch.where((ids == 4999).any(1), 1.5, 1.0),
    "a_flagged_token": any_flagged,
    "how_often": lambda ids, _: torch.where((ids == 7).sum(1) > 12, 1.5, 1.0),
    "two_tokens_in_turn": lambda ids, _: torch.where(((ids[:, :-1] == 91) & (ids[:, 1:] == 78)).any(1), 1.5, 1.0),
    "the_largest_id": lambda ids, _: torch.where(ids.amax(1) >= 4998, 1.5, 1.0),
    "one_of_a_list": lambda ids, _: torch.where(torch.isin(ids, torch.tensor([40, 4000])).cumsum(1)[:, -1] > 0, 1.5, 1),
}


@pytest.mark.parametrize("name", OF_CONTENT)
def test_numbers_that_depend_on_a_rare_content_are_seen(name):
    assert proved(scaled(OF_CONTENT[name])(vocab=5000)).differs


def test_a_norm_that_few_tokens_exceed_is_seen():
    class Loud(Plain):
        def more(self) -> None:
            self.token.weight.data[4321] *= 3

        def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = super().embed(input_ids, position_ids)
            return x * torch.where(x.norm(dim=-1).amax(1) > 12, 1.5, 1.0)[:, None, None]

    assert proved(Loud(vocab=5000)).differs


class Product(scaled(OF_LENGTH["base_by_the_last_position"][0])):  # type: ignore[misc]
    """Its output head is a product with the transposed embeddings."""

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.token.weight.T


class Sliced(Plain):
    """Takes as many rows of a table as the largest position asks for, as sound modules do."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.token(input_ids) + self.position.weight[: int(position_ids.max()) + 1][position_ids]


class Banned(Plain):
    """Bans the last tokens, as models with unused rows in their embeddings do."""

    mixes = False

    def logits(self, hidden: Tensor) -> Tensor:
        hidden = hidden - hidden.mean(1, keepdim=True) if self.mixes else hidden
        return super().logits(hidden).masked_fill(torch.arange(self.vocab) >= self.vocab - 3, torch.finfo().min)


class BannedAndMixed(Banned):
    mixes = True


def test_banned_tokens_hide_no_difference():
    assert works(Banned(), 40)
    assert not works(BannedAndMixed(), 40)


def test_a_maximum_that_changes_no_logit_is_accepted():
    assert works(Sliced(), 40)


class Chosen(Plain):
    """Multiplies by one of two numbers, by a sign that rounding decides: an expert whose router is at a tie."""

    def logits(self, hidden: Tensor) -> Tensor:
        tie = hidden.sum(-1, keepdim=True) - hidden.flip(-1).sum(-1, keepdim=True)
        return super().logits(hidden * torch.where(tie.abs() > 1e-12, 2.0, 1.0))


def test_float64_decides_where_rounding_chooses(monkeypatch):
    module = Chosen(width=256, size=64)
    assert works(module)
    monkeypatch.setattr(proof_module._Runs, "in_float64", lambda runs: None)
    assert not works(module)


@pytest.mark.parametrize("build", [scaled(OF_LENGTH["base_by_the_last_position"][0]), Product])
def test_a_large_vocabulary_is_compared_on_long_texts_too(build, monkeypatch):
    monkeypatch.setattr(proof_module, "_LOGITS", 4 * 500)
    proof = proved(build(vocab=500))
    assert (proof.longest, proof.differs) == (40, 31)


def test_a_head_whose_rows_cannot_be_chosen_bounds_the_length(monkeypatch):
    class Mixed(Plain):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden) + hidden.sum(-1, keepdim=True)

    monkeypatch.setattr(proof_module, "_LOGITS", 4 * 500)
    assert proved(Mixed(vocab=500)).longest == 16


def test_work_bounds_the_length(monkeypatch):
    monkeypatch.setattr(proof_module, "_WORK", 4e5)
    assert SHORTEST < proved(Plain()).longest < 40
    monkeypatch.setattr(proof_module, "_WORK", 1)
    assert proved(Plain()).longest == SHORTEST
