"""Where the axes of a tensor are; and the run of a whole text, which finds each attention."""

import torch
import torch.nn.functional as F

from pastkey.export.graft.time_axis.interpret import Weights
from pastkey.export.graft.time_axis.program.program import Tables
from pastkey.export.graft.time_axis.values import NEW, Axis, Lengths, Value

from .small import causal, followed, future, result, weight

TIME = Axis(1, NEW)


def test_the_batch_of_the_author_is_no_axis_of_the_tensor_until_it_must_be():
    value = Value(torch.zeros(2, 4, 3, 5), (Axis(4), Axis(1), TIME, Axis(5)), batch_axis=1)
    assert [value.dim(i) for i in (0, 2, 3)] == [1, 2, 3]
    assert value.explicit().tensor.shape == (2, 4, 1, 3, 5)
    assert value.time_axes(NEW) == [2]


def test_given_scores_become_the_weights_of_the_last_rows():
    run = followed(causal)
    scores = torch.randn(1, 1, 2, 6, generator=torch.Generator().manual_seed(4))
    found = Weights(run.program, run.found[0], Lengths(2, 6), weight, Tables(9)).run([scores], {})
    assert torch.allclose(found, (scores * 0.5).masked_fill(future(torch.zeros(1, 6))[4:], -torch.inf).softmax(-1))


def grouped(x):
    heads = x.view(1, x.shape[1], 4, 2).transpose(1, 2)
    found = F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, 2:], is_causal=True, enable_gqa=True)
    return found.transpose(1, 2).flatten(2)


def test_a_call_of_attention_is_one_attention_with_grouped_heads_and_its_mask_is_added():
    result(grouped)
    (attention,) = followed(grouped).found
    assert [op.name for op in (*attention.products, attention.op)] == ["matmul", "matmul"]
    assert attention.layouts[0].head_count == 4
    result(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=~future(x), scale=0.3))
