"""Whether a cache gives what the author's call gives is seen in torch, before anything is traced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pastkey.export.graft.probe import proof as proof_module
from pastkey.export.graft.probe.call import CONTRACT, Call
from pastkey.export.graft.probe.observe import observe
from pastkey.export.graft.probe.proof import SHORTEST, prove

from ...cases import CASES
from ...decoders import Plain
from ..plain import plain


def proved(module, context=40):
    module.eval()
    return prove(module, module, Call(CONTRACT), observe(module, context), context, brief=False)


def works(module, context=20):
    return not proved(module, context).differs


@pytest.mark.parametrize("name", CASES)
def test_decoders_of_the_contract_pass(name):
    assert works(CASES[name].build(), CASES[name].context)


ACCEPTED = {
    # Attention that is causal gives order enough; nothing is baked in that a cache would break.
    "no positions at all": lambda m, ids, at: m.token(ids),
    # As many rows of a table as the largest position asks for: a maximum that changes no logit.
    "as many rows as positions": lambda m, ids, at: m.token(ids) + m.position.weight[: int(at.max()) + 1][at],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_cache_does_not_break_is_accepted(name):
    assert works(plain({"embed": ACCEPTED[name]}), 40)


def mixed(m, input_ids, position_ids):
    hidden = Plain.embed(m, input_ids, position_ids)
    return hidden + m.mix(F.pad(hidden.transpose(1, 2), (2, 0))).transpose(1, 2)


def shifted(m, input_ids, position_ids):
    hidden = Plain.embed(m, input_ids, position_ids)
    return hidden + F.pad(hidden, (0, 0, 1, 0))[:, :-1]


CONVOLUTION = {"more": lambda m: setattr(m, "mix", nn.Conv1d(32, 32, 3, groups=32)), "embed": mixed}
OTHER = {
    "a convolution": CONVOLUTION,
    "a running mean": {"logits": lambda m, x: m.head(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None])},
    "a shift of tokens": {"embed": shifted},
    "positions are ignored": {"embed": lambda m, ids, at: m.token(ids) + m.position(torch.arange(ids.shape[1]))},
    "later tokens": {"logits": lambda m, hidden: m.head(hidden) - m.head(hidden).mean(1, keepdim=True)},
    "chance": {"logits": lambda m, hidden: F.dropout(m.head(hidden))},
}


@pytest.mark.parametrize("name", OTHER)
def test_what_a_cache_of_keys_and_values_is_not_enough_for_is_seen(name):
    module = plain(OTHER[name])
    assert not works(module)
    assert not any(child._forward_hooks for child in module.modules())


def test_a_convolution_is_seen_at_the_smallest_context_too():
    assert not works(plain(CONVOLUTION, context=2), context=2)


def test_a_failure_where_tokens_do_not_begin_at_position_0_is_seen():
    def embed(m, ids, at):
        return m.token(ids) + m.position.weight[: 2 * ids.shape[1] - 1][at]

    with pytest.raises(IndexError):
        works(plain({"embed": embed}), context=12)


# --- lengths and contents that random short texts do not show ------------------------------------------------------
def scaled(factor, **arguments):
    """Moves the embeddings by a number (B,) of the whole text, which is made of ids and positions (B, T)."""

    def embed(m, ids, at):
        return Plain.embed(m, ids, at) + (factor(ids, at) - 1)[:, None, None] * torch.linspace(-1, 1, m.width)

    return plain({"embed": embed}, **arguments)


OF_LENGTH = {  # and the shortest text that shows it
    "base_by_the_last_position": (lambda ids, at: torch.where(at.amax(1) < 30, 1.0, 1.1), 31),
    "tokens_beyond_a_number": (lambda ids, _: 1 + 0.01 * (torch.ones_like(ids).sum(1) - 20).clamp(min=0), 21),
    "one_token": (lambda ids, _: torch.full((len(ids),), 2.0 if ids.shape[1] == 1 else 1.0), 2),
    "one_length_alone": (lambda ids, at: torch.where(at.amax(1) == 24, 1.5, 1.0), 25),
    "every_eighth": (lambda ids, at: torch.where(at.amax(1) % 8 == 5, 1.5, 1.0), 6),
}


@pytest.mark.parametrize("name", OF_LENGTH)
def test_numbers_that_depend_on_the_length_are_seen_with_the_shortest_text(name):
    factor, shortest = OF_LENGTH[name]
    proof = proved(scaled(factor))
    assert (proof.longest, proof.differs) == (40, shortest)
    assert proof.off > 1e-3


FLAGS = torch.arange(5000) == 4321


def counted(ids, _):
    counts = torch.zeros(len(ids), 5000).scatter_add(1, ids, torch.ones(ids.shape))
    return torch.where(counts[:, 4321] > 0, 1.5, 1.0)


def one_of_nine(ids, _):
    hits = [(ids == number).any(1) * (number == 4321) for number in (*range(10, 90, 10), 4321)]
    return 1 + torch.stack(hits).sum(0)


OF_CONTENT = {
    "the_first_token": lambda ids, _: torch.where(ids[:, 0] == 4321, 1.5, 1.0),
    "the_last_token": lambda ids, _: torch.where(ids[:, -1] == 4321, 1.5, 1.0),
    "a_count_of_each_token": counted,
    "a_product": lambda ids, _: 1 + ((ids == 4321).float()[:, None] @ torch.ones(len(ids), ids.shape[1], 1))[:, 0, 0],
    "the_ninth_number": one_of_nine,
    "a_flagged_token": lambda ids, _: torch.where(FLAGS[ids].any(1), 1.5, 1.0),
    "how_often": lambda ids, _: torch.where((ids == 7).sum(1) > 12, 1.5, 1.0),
    "two_tokens_in_turn": lambda ids, _: torch.where(((ids[:, :-1] == 91) & (ids[:, 1:] == 78)).any(1), 1.5, 1.0),
    "the_largest_id": lambda ids, _: torch.where(ids.amax(1) >= 4998, 1.5, 1.0),
    "one_of_a_list": lambda ids, _: torch.where(torch.isin(ids, torch.tensor([40, 4000])).cumsum(1)[:, -1] > 0, 1.5, 1),
}


@pytest.mark.parametrize("name", OF_CONTENT)
def test_numbers_that_depend_on_a_rare_content_are_seen(name):
    assert proved(scaled(OF_CONTENT[name], vocab=5000)).differs


def loud(m, ids, at):
    x = Plain.embed(m, ids, at)
    return x * torch.where(x.norm(dim=-1).amax(1) > 12, 1.5, 1.0)[:, None, None]


def test_a_norm_that_few_tokens_exceed_is_seen():
    module = plain({"embed": loud}, vocab=5000)
    module.token.weight.data[4321] *= 3
    assert proved(module).differs


def banned(m, hidden):
    """Bans the last tokens, as models with unused rows in their embeddings do."""
    return Plain.logits(m, hidden).masked_fill(torch.arange(m.vocab) >= m.vocab - 3, torch.finfo().min)


def test_banned_tokens_hide_no_difference():
    assert works(plain({"logits": banned}), 40)
    assert not works(plain({"logits": lambda m, hidden: banned(m, hidden - hidden.mean(1, keepdim=True))}), 40)


def chosen(m, hidden):
    """Multiplies by one of two numbers, by a sign that rounding decides: an expert whose router is at a tie."""
    tie = hidden.sum(-1, keepdim=True) - hidden.flip(-1).sum(-1, keepdim=True)
    return Plain.logits(m, hidden * torch.where(tie.abs() > 1e-12, 2.0, 1.0))


def test_float64_decides_where_rounding_chooses(monkeypatch):
    module = plain({"logits": chosen}, width=256, size=64)
    assert works(module)
    monkeypatch.setattr(proof_module._Runs, "in_float64", lambda runs: None)
    assert not works(module)


# --- how long a text is compared ------------------------------------------------------------------------------------
def test_the_vocabulary_and_work_bound_the_length(monkeypatch):
    monkeypatch.setattr(proof_module, "_LOGITS", 4 * 500)
    assert proved(plain(vocab=500)).longest == 16
    monkeypatch.setattr(proof_module, "_WORK", 4e5)
    assert SHORTEST < proved(plain()).longest < 40
    monkeypatch.setattr(proof_module, "_WORK", 1)
    assert proved(plain()).longest == SHORTEST
