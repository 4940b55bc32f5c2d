"""Each refusal has its true causes: all obstacles at once, each with its line."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pastkey.export.graft.probe.causes import Cause, Kind, NoCacheError
from pastkey.export.graft.probe.contract import in_contract

from ....shared import divided
from ..own import refused
from ..own.blocks import Mixing
from ..own.parts import VOCAB, Causal, Gpt, attending
from ..own.refused import REFUSED

QUICK = ("no_mask", "mean_over_time", "gru", "count_that_the_logits_read", "complex_scores", "flex_attention")
SHORT = 12  # of the context, which is enough for most causes


def refusal(module, context=SHORT):
    with pytest.raises(NoCacheError) as caught:
        in_contract(module, context, None, lambda _: None)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.filterwarnings("ignore")  # torch's, that flex_attention is slow without torch.compile
@pytest.mark.parametrize("name", divided(REFUSED, quick=QUICK, ci=REFUSED))
def test_a_module_is_refused_by_its_true_cause_and_line(name):
    own = REFUSED[name]
    error = refusal(own.make())
    told = re.search(r"([\w.]+\.py):(\d+)(?:-(\d+))? (?:computes )?" + own.words, str(error))
    assert told, str(error)
    lines, first = inspect.getsourcelines(own.owner)
    assert told[1] == Path(inspect.getfile(own.owner)).name
    assert first <= int(told[2]) <= int(told[3] or told[2]) < first + len(lines)
    assert len(error.causes) == own.causes
    assert ("for 2 reasons:  (1) " in str(error)) == (own.causes == 2)
    assert str(error).index(told[0]) == min(str(error).index(c.where) for c in error.causes)


class SeveralAttentions(Gpt):
    """The noise of one, the look-ahead of others, a mean and a running sum."""

    def __init__(self):
        super().__init__(Causal, layers=1)
        self.ahead, self.open = (attending(f)() for f in (refused.one_head_ahead, refused.no_mask))

    def forward(self, idx):
        x = self.embed(idx)
        x = x + 0.1 * torch.rand_like(x)
        x = x + F.dropout(x, 0.1)
        x = x + self.ahead(x)
        x = x - x.mean(1, keepdim=True)
        x = self.blocks[0](x + x.cumprod(1) / 10)
        return self.lm_head(x + self.open(x))


def test_one_run_tells_everything_that_stands_in_the_way():
    error = refusal(SeveralAttentions().eval())
    kinds = [cause.kind for cause in error.causes]
    assert kinds == [Kind.CHANCE] * 2 + [Kind.LOOK_AHEAD] * 3 + [Kind.RECURRENCE]
    assert len({cause.where for cause in error.causes}) == 6
    sentence = str(error)
    assert "cannot be given a cache, for 6 reasons:  (1) " in sentence
    assert ";  (6) test_causes.py:" in sentence
    assert sentence.count("random numbers belong in training only") == 1


def dropping(self, q, k, v):
    """Weights that are dropped out, and a mask that looks ahead."""
    scores = self.scores(q, k) + torch.ones(q.size(2), q.size(2)).tril()
    return F.dropout(scores.softmax(-1), 0.1) @ v


def of_whole(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


@pytest.mark.parametrize("attention", [dropping, of_whole])
def test_the_mask_behind_active_dropout_is_looked_at(attention):
    error = refusal(Gpt(attending(attention)).eval())
    assert [c.kind for c in error.causes] == [Kind.CHANCE, Kind.LOOK_AHEAD]


class Between(nn.Module):
    """A function instead of an MLP."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def loop_and_noise(x):
    if x.sum() % 1 > 0.5:
        x = x * 2
    return x + torch.rand_like(x)


RARE = {  # faults that a text hardly ever shows, and the kinds of its causes
    "noise where no trace is made": (loop_and_noise, {Kind.CHANCE, Kind.DATA}),
    "once in fifty runs it is not there": (
        lambda x: x * 0 if np.random.rand() < 0.02 else torch.tanh(x), {Kind.CHANCE}
    ),
    "a branch that texts hardly ever take": (lambda x: torch.tanh(x) if x.abs().max() > 1e6 else x, {Kind.DATA}),
}  # fmt: skip


@pytest.mark.parametrize("name", RARE)
def test_chance_and_branches_are_found_where_runs_hardly_show_them(name):
    function, kinds = RARE[name]
    causes = refusal(Mixing(Between(function)).eval()).causes
    assert causes[0].kind == min(kinds)
    assert {cause.kind for cause in causes} >= kinds
    assert all(cause.where.startswith("test_causes.py:") for cause in causes if cause.where)


class Asserting(Gpt):
    """Branches on a table, and on the tokens where the other answer is an error."""

    def forward(self, idx):
        if idx.max() >= VOCAB:  # no assert, of which pytest makes other code in this file
            raise AssertionError("beyond the vocabulary")
        if (idx < 0).any():
            raise ValueError("negative")
        logits = super().forward(idx)
        return logits if torch.ones(2, 2).tril().sum() > 0 else -logits


# --- the sentence -------------------------------------------------------------------------------------------------


def test_the_truer_cause_comes_first_and_none_twice():
    ahead = Cause(Kind.LOOK_AHEAD, "looks ahead", "model.py:7")
    error = NoCacheError("Model", [ahead, Cause(Kind.CHANCE, "draws", "model.py:9"), ahead])
    assert [cause.where for cause in error.causes] == ["model.py:9", "model.py:7"]


def test_what_is_unknown_where_a_cause_is_known_is_left_out():
    state = Cause(Kind.STATE, "keeps", "model.py:9", "Attention")
    unknown = [Cause(Kind.UNKNOWN, "joins rows", f"{owner}.py:1", owner) for owner in ("Attention", "Other")]
    assert [cause.owner for cause in NoCacheError("Model", [*unknown, state]).causes] == ["Attention", "Other"]


def test_what_is_seen_from_outside_is_added_where_it_is_not_explained():
    error = NoCacheError("Model", [Cause(Kind.LOOK_AHEAD, "averages", "model.py:7")])
    seen = [Cause(Kind.LOOK_AHEAD, "changes"), Cause(Kind.ROWS, "changes rows")]
    assert [cause.kind for cause in error.with_(seen).causes] == [Kind.ROWS, Kind.LOOK_AHEAD]


# --- a cause that looks like another one --------------------------------------------------------------------------
class Conjugated(Causal):
    """Rotary positions by conjugated tables and values, which torch resolves when they are read."""

    def turned(self, x):
        angles = torch.outer(torch.arange(x.size(2)).float(), torch.arange(self.size // 2) / 7)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = (pairs.conj() * torch.polar(torch.ones_like(angles), angles).conj()).conj().resolve_conj()
        return torch.view_as_real(turned).flatten(-2)

    def scores(self, q, k):
        return super().scores(self.turned(q), self.turned(k))


TAKEN = {
    "a buffer that no logits read": refused.Counting,
    "assertions, and branches on tables": lambda: Asserting(Causal),
    "conjugated numbers": lambda: Gpt(Conjugated, layers=1),
}


@pytest.mark.parametrize("name", divided(TAKEN, quick=["a buffer that no logits read", "conjugated numbers"], ci=TAKEN))
def test_what_is_no_cause_is_taken(name):
    module = TAKEN[name]().eval()
    found, ids = in_contract(module, SHORT, None, lambda _: None), torch.arange(SHORT)[None]
    assert found.call == "model(ids)"
    with torch.no_grad():
        assert torch.allclose(found.module(ids, ids), module(ids), atol=1e-5)


class AlwaysTraining(Gpt):
    """Its train() ignores that eval() asks for False, so that embeddings are dropped out."""

    def __init__(self):
        super().__init__(Causal, layers=1)
        self.drop = nn.Dropout(0.1)

    def train(self, mode=True):
        return super().train(True)

    def embed(self, idx):
        return self.drop(super().embed(idx))


def test_a_train_of_its_own_that_ignores_eval_explains_all():
    (cause,) = refusal(AlwaysTraining()).causes
    assert cause.kind == Kind.TRAINING
    assert re.match(r"stays in training mode .* the train\(\) of AlwaysTraining", cause.what)
