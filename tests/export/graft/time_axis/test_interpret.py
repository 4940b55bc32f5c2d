"""The run of a whole text finds each attention; the weights of one are run with scores that are given."""

import torch
import torch.nn.functional as F

from pastkey.export.graft.probe.causes import Kind
from pastkey.export.graft.time_axis.interpret import Weights
from pastkey.export.graft.time_axis.program.program import Tables
from pastkey.export.graft.time_axis.values import Lengths

from .small import causal, causes, followed, result, weight


def test_given_scores_become_the_weights_of_the_last_rows():
    run = followed(causal)
    scores = torch.randn(1, 1, 2, 6, generator=torch.Generator().manual_seed(4))
    found = Weights(run.program, run.found[0], Lengths(2, 6), weight, Tables(9)).run([scores], {})
    future = torch.ones(6, 6).triu(1).bool()[4:]
    assert torch.allclose(found, (scores * 0.5).masked_fill(future, -torch.inf).softmax(-1))


def grouped(x):
    heads = x.view(1, x.shape[1], 4, 2).transpose(1, 2)
    found = F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, 2:], is_causal=True, enable_gqa=True)
    return found.transpose(1, 2).flatten(2)


def test_a_call_of_attention_is_one_attention_with_grouped_heads():
    result(grouped)
    (attention,) = followed(grouped).found
    assert [op.name for op in (*attention.products, attention.op)] == ["matmul", "matmul"]
    assert attention.layouts[0].head_count == 4


def test_a_mask_by_a_table_is_added():
    def function(x):
        mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.3)

    result(function)


def test_behind_what_is_refused_the_rest_is_looked_at():
    found = causes(lambda x: causal(x.cumsum(1)).flip(1))
    assert [one.kind for one in found] == [Kind.RECURRENCE, Kind.LOOK_AHEAD]


def test_a_table_that_is_another_one_for_a_longer_text_is_refused():
    found = causes(lambda x: x + torch.arange(x.shape[1]).flip(0)[:, None])
    assert [one.kind for one in found] == [Kind.LENGTH]
    assert found[0].what.startswith("computes a table that is another one for a longer text")
