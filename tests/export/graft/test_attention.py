"""Every attention call is seen once, whichever way it is written, and torch is put back as it was."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from pastkey.errors import ContractError
from pastkey.export.graft.attention import AttentionCall, MaskSpec, attend, described_mask, intercept, torch_attention
from pastkey.export.graft.probe.observe import evaluating

from .. import decoders
from ..decoders import MultiHead, Plain

LENGTH = 6


def run(module, watch=None):
    """The logits and the calls that were handed over on the way."""
    calls: list[AttentionCall] = []

    def handler(call):
        calls.append(call)
        return torch_attention(call)

    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % 5
    with evaluating(module), intercept(handler, watch):
        logits = module(ids, position_ids=torch.arange(LENGTH).expand_as(ids))
    return logits, calls


WRITTEN = {  # in which way, and the layers
    "attribute_of_F": (lambda: Plain(layers=3), 3),
    "imported_by_name": (lambda: decoders.NanoGpt(layers=2), 2),
    "MultiheadAttention": (lambda: MultiHead(layers=2), 2),
    "MultiheadAttention_batch_first": (lambda: decoders.MultiHeadBatchFirst(layers=2), 2),
    "TransformerEncoderLayer": (lambda: decoders.EncoderLayers(layers=2), 2),
    "TransformerEncoder": (decoders.Encoder, 2),
    "TransformerEncoder_is_causal": (decoders.HintedEncoder, 2),
    "compiled": (decoders.CompiledAttention, 1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_each_call_is_counted_once_and_changes_nothing(name):
    build, layers = WRITTEN[name]
    module = build()
    logits, calls = run(module)
    assert len(calls) == layers
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % 5
    with evaluating(module), torch.compiler.set_stance("force_eager"):
        untouched = module(ids, torch.arange(LENGTH).expand_as(ids))
    torch.testing.assert_close(logits, untouched, rtol=1e-5, atol=1e-5)


def test_a_call_has_four_axes_its_own_scale_and_the_line_that_made_it():
    _, (call,) = run(decoders.OneHead(heads=1, size=16))
    assert (call.query.shape, call.scale, call.is_causal) == ((2, 1, LENGTH, 16), 0.3, True)
    for module in (Plain(), MultiHead()):  # the line that calls nn.MultiheadAttention, not torch's own
        _, (call,) = run(module)
        assert re.fullmatch(r"decoders\.py:\d\d+", call.where)


def test_watch_sees_other_functions_but_not_those_of_the_handler():
    seen: list[object] = []
    run(Plain(), lambda func, args, kwargs: seen.append(func))
    assert (F.embedding in seen, seen.count(F.layer_norm)) == (True, 1)
    assert not {F.scaled_dot_product_attention, F.softmax} & {*seen}


def test_torch_is_put_back_as_it_was_after_an_exception():
    original, fastpath = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def handler(call):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise RuntimeError("in the handler")

    query = torch.randn(1, 1, 3, 8)
    with pytest.raises(RuntimeError, match="in the handler"), intercept(handler):
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert F.scaled_dot_product_attention is original
    assert torch.backends.mha.get_fastpath_enabled() is fastpath


# --- what a library's hook hands over -----------------------------------------------------------------------------
def call(**changes):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    plain = {"mask": None, "dropout": 0.0, "is_causal": True, "scale": 0.3, "where": "here"}
    return AttentionCall(query=query, key=key, value=value, **(plain | changes))


def one_by_one(given):
    """Softmax attention with a loop for every axis but the last."""
    output = torch.zeros(*given.query.shape[:3], given.value.shape[3])
    for b, h, t in itertools.product(*map(range, given.query.shape[:3])):
        first = 0 if given.window is None else max(0, t + 1 - given.window)
        scores = given.key[b, h // given.groups, first : t + 1] @ given.query[b, h, t] * given.scale
        if given.softcap is not None:
            scores = given.softcap * torch.tanh(scores / given.softcap)
        sink = 0.0 if given.sinks is None else float(given.sinks[h].exp())
        weights = scores.exp() / (scores.exp().sum() + sink)
        output[b, h, t] = weights @ given.value[b, h // given.groups, first : t + 1]
    return output


CHANGES = [
    {}, {"window": 2}, {"softcap": 0.5}, {"sinks": torch.tensor([0.0, 1.0, -1.0, 2.0])}, {"window": 3, "softcap": 1.0}
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "_".join(changes) or "plain")
def test_windows_softcap_and_sinks_are_what_they_say(changes):
    given = call(**changes)
    torch.testing.assert_close(attend(given), one_by_one(given))
    assert not torch.allclose(one_by_one(given), one_by_one(call())) or not changes
    with intercept(lambda seen: torch.full_like(seen.query, float(seen is given))):
        assert bool((attend(given) == 1).all())


def test_a_described_mask_is_read_and_not_computed_with():
    seen: list[AttentionCall] = []

    def keep(given):
        seen.append(given)
        return torch_attention(given)

    def attended(spec):
        query = torch.randn(1, 2, 6, 8)
        with intercept(keep):
            F.scaled_dot_product_attention(query, query, query, attn_mask=described_mask(spec))

    attended(MaskSpec(window=3))
    assert (seen[0].mask, seen[0].is_causal, seen[0].window) == (None, True, 3)
    with pytest.raises(ContractError, match=r"the mask of the attention call at .* looks ahead"):
        attended(MaskSpec(unsupported="looks ahead"))
