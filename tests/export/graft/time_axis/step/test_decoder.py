"""A module of its author's becomes one of the contract, with the known form of its attention."""

import linecache

import pytest
import torch
import torch.nn.functional as F

from pastkey.contract.bundle import KVGeometry
from pastkey.export.graft.attention import intercept, torch_attention
from pastkey.export.graft.probe.causes import Kind, NoCacheError
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.observe import observe
from pastkey.export.graft.probe.positions import find_shift
from pastkey.export.graft.time_axis.step.decoder import TimeAxisDecoder, find, whole_logits
from pastkey.export.graft.time_axis.step.state import MOST_ROWS

from ...own.latents import DECODERS, ROPE
from ...own.parts import HEADS
from ..small import VOCAB, WIDTH, Of, causal, future

CONTEXT = 24
TABLE = torch.randn(CONTEXT, WIDTH, generator=torch.Generator().manual_seed(5))


def call(module, ids):
    logits = module(ids)
    return logits if logits.dim() == 3 else logits[:, None]


def found(function):
    return find(Of(function).eval(), call, CONTEXT, VOCAB)


def made(function):
    module = Of(function).eval()
    return module, TimeAxisDecoder(module, call, find(module, call, CONTEXT, VOCAB), CONTEXT)


def attending(x, change):
    """Causal attention whose scores are changed first."""
    return change(x @ x.mT).masked_fill(future(x), -torch.inf).softmax(-1) @ x


def far(x):
    places = torch.arange(x.shape[1])
    return places[:, None] - places[None, :]


def alibi(x):
    return attending(x, lambda scores: scores - 0.5 * far(x))


def window(x):
    return attending(x, lambda scores: scores.masked_fill(far(x) >= 3, -torch.inf))


def test_a_plain_attention_is_planned_with_its_scale():
    (planned,) = found(causal).plan.values()
    assert planned.known
    assert planned.scale == pytest.approx(0.5, rel=1e-6)
    assert (planned.window, planned.bias, planned.softcap, planned.sinks) == (None, False, None, False)


def test_a_bias_is_kept_and_a_window_is_told():
    kept = found(alibi)
    assert [planned.bias for planned in kept.plan.values()] == [True]
    assert torch.allclose(kept.constants["bias_0"], -0.5 * torch.arange(CONTEXT)[None].float(), atol=1e-5)
    assert [planned.window for planned in found(window).plan.values()] == [3]


@pytest.mark.parametrize("function", [causal, alibi, window, lambda x: causal(x)[:, -1]])
def test_it_computes_what_its_author_does_for_every_row(function):
    module, decoder = made(function)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), intercept(torch_attention):
        stepped = decoder(ids, torch.arange(9).expand(2, 9))
        with decoder.native():
            native = decoder(ids, torch.arange(9).expand(2, 9))
    assert stepped.shape == (2, 9, WIDTH)
    assert torch.allclose(stepped, native, atol=1e-5)
    assert torch.equal(native[:1], whole_logits(module, call, ids[:1]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + TABLE[: x.shape[1]],
        lambda x: x + TABLE[torch.arange(x.shape[1])],
        lambda x: x * torch.arange(x.shape[1])[None, :, None].float().sin(),
        lambda x: (x.mT + TABLE.T[:, : x.shape[1]]).mT,
        lambda x: torch.cat([x, TABLE[: x.shape[1], :2].cos().expand(1, -1, -1)], -1),
        lambda x: x.reshape(-1, WIDTH // 2).reshape(1, -1, WIDTH) + 1,
    ],
)
def test_tables_give_each_new_token_the_row_of_its_position(function):
    module, decoder = made(function)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(6))
    positions = torch.tensor([[4, 5, 6], [0, 1, 2]])  # rows of different lengths
    with torch.no_grad():
        whole = torch.stack([module(row[None])[0] for row in ids])
        stepped = decoder(ids.gather(1, positions), positions)
    expected = whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[2]))
    assert torch.allclose(stepped, expected, atol=1e-5)


# --- refused ------------------------------------------------------------------------------------------------------
def ahead(x):
    return (x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(2).bool(), -torch.inf).softmax(-1) @ x


def of_a_softmax(x):
    weights = (x @ x.mT).softmax(-1)
    return weights.masked_fill(future(x) | (weights < 1e-18), 0) @ x / 3


def with_a_temperature_of_each_token(x, scores):
    scores = scores * (1 + x[..., :1].sigmoid())
    return scores.clamp(min=scores.max(-1, keepdim=True).values - 50)


def convolved(x, kernel, before):
    weights = torch.arange(1.0, 1 + WIDTH * kernel).reshape(WIDTH, 1, kernel) / kernel
    return F.conv1d(F.pad(x.mT, (before, kernel - 1 - before)), weights, groups=WIDTH).mT


SCORES = "over all scores before the mask hides those of later"
EARLIER = "moves rows of later tokens to earlier ones"
REFUSED = {  # by the words of the cause, and of its line
    "a mask that is off by one": (ahead, "see that at", "softmax"),
    "rows that come back nowhere": (lambda x: x[:, 1:], "reads a part of the positions", "never the rest"),
    "below the largest": (
        lambda x: attending(x, lambda s: s.masked_fill(s < s.amax(-1, keepdim=True) - 40, -1e9)),
        f"computes amax {SCORES}",
        ".amax(",
    ),
    "hidden below the mean": (
        lambda x: attending(x, lambda s: torch.where(s < s.mean(-1, keepdim=True) - 40, -torch.inf, s)),
        f"computes mean {SCORES}",
        ".mean(",
    ),
    "a temperature of each token": (
        lambda x: attending(x, lambda s: with_a_temperature_of_each_token(x, s)), f"computes max {SCORES}", ".max("
    ),
    "of a softmax": (of_a_softmax, SCORES, "weights"),
    "a convolution around each": (lambda x: convolved(x, 3, 1), EARLIER, ""),
    "rows moved ahead": (lambda x: F.pad(x, (0, 0, -1, 1)), EARLIER, "F.pad"),
    "a long convolution": (lambda x: convolved(x, MOST_ROWS + 2, MOST_ROWS + 1), "with the 17 tokens before it", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_later_tokens_or_too_many_is_refused_with_its_line(name):
    function, words, line = REFUSED[name]
    with pytest.raises(NoCacheError) as caught:
        found(function)
    (cause,) = [cause for cause in caught.value.causes if words in cause.what]
    file, number = cause.where.split(":")
    assert file == "test_decoder.py"
    assert (cause.kind == Kind.RECURRENCE) == ("17" in words)
    assert line in linecache.getline(__file__, int(number.partition("-")[0]))


def the_largest_is_taken_away_first(x):
    scores = x @ x.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(future(x), 0)
    return weights / weights.sum(-1, keepdim=True) @ x


def softmax_before_the_mask(x):
    weights = ((x @ x.mT).float() * 4).softmax(-1) * ~future(x)
    return weights / weights.sum(-1, keepdim=True) @ x


def below_the_largest_that_is_seen(x):
    scores = (x @ x.mT).masked_fill(future(x), -1e4)
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) - 40, -1e9).softmax(-1) @ x


def of_squares(x):
    return (x @ x.mT).relu().square().masked_fill(future(x), 0) @ x


@pytest.mark.parametrize(
    "function", [the_largest_is_taken_away_first, softmax_before_the_mask, below_the_largest_that_is_seen, of_squares]
)
def test_a_number_of_all_scores_that_cancels_or_that_the_mask_precedes_is_none(function):
    assert len(found(function).plan) == 1


# --- a smaller row that keys and values are linear functions of is cached in their place ------------------------------
OWN = DECODERS["latent_filled"]


@pytest.mark.slow
def test_the_fused_graph_gets_keys_and_values():
    own = DECODERS["latent_by_cat"]
    taken = in_contract(own.make(), own.context, None, lambda _: None, latents=False)
    assert taken.observation.geometry[0] == KVGeometry(HEADS, 12, 12)


def test_the_rotated_key_alone_is_turned_by_a_shift():
    module = OWN.make()
    with torch.no_grad():
        kept = find(module, OWN.call, OWN.context, OWN.vocab)
    decoder = TimeAxisDecoder(module, OWN.call, kept, OWN.context).eval()
    observation = observe(decoder, OWN.context)
    assert observation.geometry[0] == OWN.geometry
    (rotation,) = find_shift(decoder, observation, OWN.context).rotations
    assert (rotation.first, 2 * len(rotation.angles)) == (0, ROPE)
