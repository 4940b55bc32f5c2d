"""What must be refused is refused by its true cause: all that stands in the way at once, each with its line."""

from __future__ import annotations

import inspect
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from pastkey.export.graft.probe.causes import Cause, Kind, NoCacheError
from pastkey.export.graft.probe.contract import in_contract

from ....shared import divided
from ..own import look_ahead, refused
from ..own.biases import Scored
from ..own.blocks import Mixing
from ..own.parts import CONTEXT, VOCAB, Gpt
from ..own.positions import Causal
from ..own.registry import REFUSED

AHEAD = r"lets the token at position 0 see that at 1, a later one \(attention, head {head}\)"
CAUSES = {  # the class that the line is in, what it does in words, and how many causes there are
    "ones_and_zeros_added": (look_ahead.OnesAndZerosAdded, AHEAD.format(head=0), 1),
    "no_mask": (look_ahead.NoMask, AHEAD.format(head=0), 1),
    "diagonal_of_two": (look_ahead.DiagonalOfTwo, AHEAD.format(head=0), 1),
    "one_head_ahead": (look_ahead.OneHeadAhead, AHEAD.format(head=3), 1),
    "window_ahead": (look_ahead.WindowAhead, AHEAD.format(head=0), 1),
    "softmax_over_queries": (look_ahead.SoftmaxOverQueries, "computes softmax over the queries", 1),
    "mean_over_time": (look_ahead.Centred, "averages over all positions, later ones too", 1),
    "normalised_over_time": (look_ahead.NormalisedOverTime, "averages over all positions, later ones too", 2),
    "fourier": (look_ahead.Fourier, "computes fft_fft over all positions, later ones too", 1),
    "flipped": (look_ahead.Flipped, "turns the positions around, so that a token sees later ones", 1),
    "centred_convolution": (look_ahead.CentredConv, "moves rows of later tokens to earlier ones", 1),
    "little_ahead": (look_ahead.LittleAhead, "averages over all positions, later ones too", 1),
    "over_the_batch": (refused.OverTheBatch, "computes mean over the rows of the batch", 2),
    "noise": (refused.Noisy, "draws random numbers outside training", 1),
    "little_noise": (refused.Noisy, "draws random numbers outside training", 1),
    "active_dropout": (refused.ActiveDropout, r"drops out numbers outside training.* training=self\.training", 1),
    "selective_scan": (refused.SelectiveScan, "is a loop over positions or a recurrence", 1),
    "weighted_key_value": (refused.WeightedKeyValue, "is a loop over positions or a recurrence", 1),
    "linear_attention": (refused.LinearAttention, "computes cumsum over earlier positions", 2),
    "gru": (refused.Gru, "computes gru over earlier positions", 1),
    "memory": (refused.Memory, r"keeps blocks\.0\.attn\.kept from one call to the next", 1),
    "cache_in_place": (refused.CacheInPlace, r"writes into the buffers blocks\.0\.attn\.cache_k", 2),
    "whole_context": (refused.WholeContext, r"takes 48 tokens, the whole context, and no fewer", 1),
    "scaled_by_length": (refused.ScaledByLength, "computes with a number made from the length of the text", 1),
    "counted_from_the_end": (refused.CountedFromTheEnd, "computes a table that is another one for a longer text", 1),
    "learned_token": (Scored, r"has a row beside those of the text \(a learned token, or learned keys", 1),
    "learned_keys": (refused.LearnedKeys, "has 2 rows beside those of the text", 1),
    "skewed": (refused.Skewed, "multiplies by rows that are counted from the end of the text", 1),
    "places_of_the_largest": (refused.PlacesOfTheLargest, "reads where the largest scores are", 2),
    "until_certain": (refused.UntilCertain, "branches on values", 1),
}  # fmt: skip


SHORT = 12  # of the context, which is enough for most causes


def refusal(module: nn.Module, context: int = SHORT) -> NoCacheError:
    with pytest.raises(NoCacheError) as caught:
        in_contract(module, context, None, lambda _: None)
    assert "\n" not in str(caught.value)
    return caught.value


def lines_of(owner: type) -> range:
    lines, first = inspect.getsourcelines(owner)
    return range(first, first + len(lines))


def test_the_table_has_all_that_must_be_refused():
    assert CAUSES.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", divided(REFUSED, quick=["no_mask", "mean_over_time", "noise", "gru"], ci=REFUSED))
def test_a_module_is_refused_by_its_true_cause_and_line(name):
    owner, words, count = CAUSES[name]
    error = refusal(REFUSED[name].make(), CONTEXT if REFUSED[name].cause == "fixed length" else SHORT)
    told = re.search(r"([\w.]+\.py):(\d+)(?:-(\d+))? " + words, str(error))
    assert told, str(error)
    assert told[1] == Path(inspect.getfile(owner)).name
    assert int(told[2]) in lines_of(owner)
    assert int(told[3] or told[2]) in lines_of(owner)
    assert len(error.causes) == count
    assert ("for 2 reasons:  (1) " in str(error)) == (count == 2)
    assert str(error).index(told[0]) == min(str(error).index(c.where) for c in error.causes)


class SeveralAttentions(Gpt):
    """The noise of one, the look-ahead of others, a mean and a running sum."""

    def __init__(self) -> None:
        super().__init__(Causal, layers=1)
        self.ahead, self.open = look_ahead.DiagonalOfTwo(), look_ahead.NoMask()
        self.dropped = refused.ActiveDropout()

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        x = x + 0.1 * torch.rand_like(x)
        x = x + self.dropped(x)
        x = x + self.ahead(x)
        x = x - x.mean(1, keepdim=True)
        x = self.blocks[0](x + x.cumsum(1) / 10)
        return self.lm_head(x + self.open(x))


def test_one_run_tells_everything_that_stands_in_the_way():
    error = refusal(SeveralAttentions().eval())
    kinds = [cause.kind for cause in error.causes]
    assert kinds == [Kind.CHANCE] * 2 + [Kind.LOOK_AHEAD] * 3 + [Kind.RECURRENCE]
    assert len({cause.where for cause in error.causes}) == 6
    sentence = str(error)
    assert "cannot be given a cache, for 6 reasons:  (1) " in sentence
    assert ";  (6) test_causes.py:" in sentence
    assert sentence.count("what is random belongs to training alone") == 1


class Dropping(Scored):
    """Weights that are dropped out, and a mask that looks ahead."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.scores(q, k) + torch.ones(q.size(2), q.size(2)).tril()
        return F.dropout(scores.softmax(-1), 0.1) @ v


def test_the_mask_behind_active_dropout_is_looked_at():
    assert [c.kind for c in refusal(Gpt(Dropping).eval()).causes] == [Kind.CHANCE, Kind.LOOK_AHEAD]


class LoopAndNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() % 1 > 0.5:
            x = x * 2
        return x + torch.rand_like(x)


def test_noise_is_found_where_no_trace_is_made():
    error = refusal(Mixing(LoopAndNoise()).eval())
    assert error.causes[0].kind == Kind.CHANCE
    assert Kind.DATA in [cause.kind for cause in error.causes]
    assert all(cause.where.startswith("test_causes.py:") for cause in error.causes if cause.where)


class LeftOutByPython(nn.Module):
    """Once in fifty runs it is not there."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if random.random() < 0.02 else torch.tanh(x)


class LeftOutByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0 if np.random.rand() < 0.02 else torch.tanh(x)


@pytest.mark.parametrize("build", [pytest.param(LeftOutByPython, marks=pytest.mark.slow), LeftOutByNumpy])
def test_chance_is_found_whoever_draws(build):
    assert refusal(Mixing(build()).eval()).causes[0].kind == Kind.CHANCE


class RarelyOtherwise(nn.Module):
    """A branch that texts hardly ever take."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.abs().max() > 1e6 else x


def test_a_branch_on_the_tokens_is_found_though_no_text_takes_it():
    assert [cause.kind for cause in refusal(Mixing(RarelyOtherwise()).eval()).causes] == [Kind.DATA]


class Asserting(Gpt):
    """Branches on a table, and on the tokens where the other answer is an error."""

    def forward(self, idx: Tensor) -> Tensor:
        if idx.max() >= VOCAB:  # no assert, of which pytest makes other code in this file
            raise AssertionError("beyond the vocabulary")
        if (idx < 0).any():
            raise ValueError("negative")
        logits: Tensor = super().forward(idx)
        return logits if torch.ones(2, 2).tril().sum() > 0 else -logits


@pytest.mark.slow
def test_assertions_and_branches_on_tables_are_no_cause():
    assert in_contract(Asserting(Causal).eval(), SHORT, None, lambda _: None).call == "model(ids)"


class OfWhole(Scored):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


@pytest.mark.slow
def test_a_call_that_drops_out_and_is_not_causal_is_told_both():
    sentence = str(refusal(Gpt(OfWhole).eval()))
    assert "drops out numbers outside training" in sentence
    assert "lets the token at position 0 see that at 1" in sentence
    assert "dropout_p=self.dropout if self.training else 0.0" in sentence


# --- the sentence -------------------------------------------------------------------------------------------------


def test_the_truer_cause_comes_first_and_none_twice():
    ahead = Cause(Kind.LOOK_AHEAD, "looks ahead", "model.py:7")
    error = NoCacheError("Model", [ahead, Cause(Kind.CHANCE, "draws", "model.py:9"), ahead])
    assert [cause.where for cause in error.causes] == ["model.py:9", "model.py:7"]


def test_what_is_unknown_where_a_cause_is_known_is_left_out():
    state = Cause(Kind.STATE, "keeps", "model.py:9", "Attention")
    unknown = [
        Cause(Kind.UNKNOWN, "joins rows", f"model.py:{i}", owner) for i, owner in enumerate(("Attention", "Other"))
    ]
    assert [cause.owner for cause in NoCacheError("Model", [*unknown, state]).causes] == ["Attention", "Other"]


def test_what_is_seen_from_outside_is_added_where_it_is_not_explained():
    error = NoCacheError("Model", [Cause(Kind.LOOK_AHEAD, "averages", "model.py:7")])
    seen = [Cause(Kind.LOOK_AHEAD, "changes"), Cause(Kind.ROWS, "changes rows")]
    assert [cause.kind for cause in error.with_(seen).causes] == [Kind.ROWS, Kind.LOOK_AHEAD]


# --- a cause that looks like another one --------------------------------------------------------------------------
class Counting(Gpt):
    """Counts its calls in a buffer, which its logits read or not."""

    calls: Tensor

    def __init__(self, share: float) -> None:
        super().__init__(Causal, layers=1)
        self.share = share
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, idx: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = super().forward(idx)
        return logits + self.share * self.calls if self.share else logits


def test_a_buffer_that_no_logits_read_is_no_state():
    assert in_contract(Counting(0).eval(), SHORT, None, lambda _: None).call == "model(ids)"


def test_a_count_that_the_logits_read_is_no_cache():
    (cause,) = refusal(Counting(1e-9).eval()).causes
    assert (cause.kind, cause.what) == (Kind.STATE, "writes into the buffer calls")


class ComplexScores(Scored):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a, b = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
        scores = (a @ b.conj().transpose(-1, -2)).real / self.size**0.5
        return scores.masked_fill(torch.ones(q.size(2), q.size(2)).triu(1).bool(), float("-inf")).softmax(-1) @ v


def test_products_of_complex_matrices_are_told_by_their_line():
    (cause,) = refusal(Gpt(ComplexScores, layers=1).eval()).causes
    assert cause.what.startswith("multiplies matrices of complex numbers")
    assert cause.where.startswith("test_causes.py:")


class Conjugated(Scored):
    """Rotary positions by conjugated tables and values, which torch resolves when they are read."""

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.size(2)).float(), torch.arange(self.size // 2) / 7)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = (pairs.conj() * torch.polar(torch.ones_like(angles), angles).conj()).conj().resolve_conj()
        return torch.view_as_real(turned).flatten(-2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.turned(q), self.turned(k))


def test_conjugated_numbers_are_followed():
    module = Gpt(Conjugated, layers=1).eval()
    made = in_contract(module, SHORT, None, lambda _: None).module
    ids = torch.arange(SHORT)[None]
    with torch.no_grad():
        assert torch.allclose(made(ids, ids), module(ids), atol=1e-5)


class Flexible(Scored):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def capped(score: Tensor, _b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, torch.tanh(score), -float("inf"))

        attended = flex_attention(q, k, v, score_mod=capped)
        assert isinstance(attended, Tensor)
        return attended


@pytest.mark.filterwarnings("ignore")  # torch's, that it is slow without torch.compile
def test_flex_attention_is_told_with_what_to_write():
    (cause,) = refusal(Gpt(Flexible, layers=1).eval()).causes
    assert cause.what.startswith("calls flex_attention, which cannot be followed: write F.scaled_dot_product_attention")
    assert cause.where.startswith("test_causes.py:") or cause.where.startswith("parts.py:")


class AlwaysTraining(Gpt):
    def __init__(self) -> None:
        super().__init__(Causal, layers=1)
        self.drop = nn.Dropout(0.1)

    def train(self, mode: bool = True) -> AlwaysTraining:
        super().train(True)
        return self

    def embed(self, idx: Tensor) -> Tensor:
        dropped: Tensor = self.drop(super().embed(idx))
        return dropped


def test_a_train_of_its_own_that_ignores_eval_is_told():
    error = refusal(AlwaysTraining())
    assert [cause.kind for cause in error.causes] == [Kind.TRAINING]
    assert "the train() of AlwaysTraining decides" in str(error)
    assert "super().train(mode)" in str(error)
    assert "F.dropout" not in str(error)
