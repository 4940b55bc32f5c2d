"""How a module is called is found by trying, or given."""

import itertools
import shlex
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pastkey.errors import ContractError, InputError
from pastkey.export.graft.probe.call import Call, find_call, is_plain
from pastkey.export.graft.probe.causes import Kind, NoCacheError
from pastkey.export.graft.probe.contract import in_contract

from ...decoders import NanoGpt
from ..own.parts import Causal, Gpt, drawn

VOCAB, CONTEXT = 11, 12


class Counted(nn.Module):
    """Logits of the mean of all tokens so far: a decoder without attention, as wide as its vocabulary."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Embedding(VOCAB, VOCAB), nn.Linear(VOCAB, VOCAB)

    def logits(self, ids):
        """(B, T) -> (B, T, V)."""
        x = self.token(ids)
        return self.head(torch.tanh(x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]))

    def some(self, ids, asked):
        return self.logits(ids) if asked else None

    def some_banned(self, ids):
        return self.logits(ids).masked_fill(torch.arange(VOCAB) > 7, -torch.inf)


def of(forward):
    """The decoder with this forward."""
    return drawn(type("Decoder", (Counted,), {"forward": forward}))


def one_row(model, ids):
    (_,) = ids.shape
    return model.logits(ids[None])[0]


def batch_of_one(model, ids):
    assert ids.shape[0] == 1
    return model.logits(ids)


def time_first(model, ids):
    assert ids.dim() == 2
    return model.logits(ids.T).transpose(0, 1)


def ahead_without_mask(model, ids, mask):
    scores = torch.zeros(ids.shape[1], ids.shape[1]) + (0.0 if mask is None else mask)
    return model.head(torch.tanh(scores.softmax(-1) @ model.token(ids)))


def last_unless_targets(model, ids, position_ids=None, targets=None):
    """Has its targets behind positions, which are no place for ids."""
    logits = model.logits(ids) if position_ids is None else model.logits(ids) + position_ids[..., None] * 0
    return logits if targets is not None else logits[:, -1]


def last_without(m, ids, targets=None):
    return m.logits(ids) if targets is not None else m.logits(ids)[:, [-1]], None


def row_with_positions(m, ids, position_ids=None):
    return one_row(m, ids) + (0 if position_ids is None else position_ids[..., None])


def started(m, ids, start):
    return m.logits(ids) + (torch.arange(ids.shape[1]) + start)[:, None] * 0.01


# The expression that is found and the order of the axes of its result, and a forward.
FOUND = {
    "plain": ("model(ids) btv", lambda m, ids: m.logits(ids)),
    "last without targets": ("model(ids, ids)[0] btv", last_without),
    "in a dictionary": ("model(ids)['o'][0] btv", lambda m, ids: {"h": m.token(ids)[..., :4], "o": [m.logits(ids)]}),
    "in an object": ("model(ids).logits btv", lambda m, ids: SimpleNamespace(loss=None, logits=m.logits(ids))),
    "time first": ("model(ids.T) tbv", time_first),
    "one row": ("model(ids[0]) tv", one_row),
    "one row with positions": ("model(ids[0]) tv", row_with_positions),
    "last alone": ("model(ids) bv", lambda m, ids: m.logits(ids)[:, -1]),
    "targets behind positions": ("model(ids, targets=ids) btv", last_unless_targets),
    "a batch of one": ("model(ids[:1]) btv", batch_of_one),
    "the last of one": ("model(ids[:1]) bv", lambda m, ids: batch_of_one(m, ids)[:, -1]),
    "the first row": ("model(ids[:1]) tv", lambda m, ids: m.logits(ids[:1])[0]),
    "the last of the first row": ("model(ids[:1]) v", lambda m, ids: batch_of_one(m, ids)[0, -1]),
    "squeezed": ("model(ids) btv", lambda m, ids: m.logits(ids).squeeze()),
    # Only one of several results can be the logits, by its name, its axes or its numbers.
    "named": ("model(ids)['logits'] btv", lambda m, ids: {"draft_logits": m.token(ids), "logits": m.logits(ids)}),
    "named so": ("model(ids)['lm_logits'] btv", lambda m, ids: {"h": m.token(ids), "lm_logits": m.logits(ids)}),
    "wider": ("model(ids)['o'] btv", lambda m, ids: {"router_logits": m.token(ids)[..., :4], "o": m.logits(ids)}),
    "equal to another": ("model(ids)[0] btv", lambda m, ids: (m.logits(ids), m.logits(ids).clone())),
    "beside a loss": ("model(ids)[0] btv", lambda m, ids: (m.logits(ids), m.logits(ids).mean())),
    "of all positions": ("model(ids)[1] btv", lambda m, ids: (m.logits(ids)[:, -1], m.logits(ids))),
    "not probabilities": ("model(ids)[1] btv", lambda m, ids: (m.logits(ids).softmax(-1), m.logits(ids))),
    "not of later tokens": ("model(ids)[1] btv", lambda m, ids: (m.token(ids).flip(1), m.logits(ids))),
    # Logits that are made if they are asked for, as a flag or as an argument that must be given.
    "asked for": (
        "model(ids, get_logits=True)['logits'] btv",
        lambda m, ids, targets=None, *, get_logits=False: {"logits": m.some(ids, get_logits), "loss": None},
    ),
    "not skipped": ("model(ids, skip_logits=False) btv", lambda m, ids, skip_logits=True: m.some(ids, not skip_logits)),
    "returned": ("model(ids, True) btv", lambda m, ids, return_logits: m.some(ids, return_logits is True)),
    "scaled": ("model(ids) btv", lambda m, ids, scale_logits=False: m.logits(ids) * (2 if scale_logits else 1)),
    # Other logits than those of `plain`.
    "a start": ("model(ids, 0) btv", started),
    "a mask": ("model(ids, mask=future_scores) btv", lambda m, ids, mask=None: ahead_without_mask(m, ids, mask)),
}


def probed(module, asked=None):
    return find_call(module, CONTEXT, asked)


def test_a_look_ahead_over_rows_is_not_taken_for_one_row_over_other_axes():
    found = probed(of(lambda m, ids: m.logits(ids) + m.logits(ids).mean(1, keepdim=True)))
    assert (found.call.expression, {cause.kind for cause in found.breaches}) == ("model(ids)", {Kind.LOOK_AHEAD})


@pytest.mark.parametrize("name", FOUND)
def test_the_call_is_found_and_how_the_logits_lie(name):
    called, forward = FOUND[name]
    expression, _, order = called.rpartition(" ")
    module = of(forward)
    found = probed(module)
    assert (found.call.expression, found.call.order) == (expression, order)
    assert (found.vocab_size, found.breaches) == (VOCAB, ())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = found.call(module, ids)
        assert logits.shape == (1, 6 if "t" in order else 1, VOCAB)
        assert name in ("a start", "a mask") or torch.allclose(logits[:, -1], module.logits(ids)[:, -1], atol=1e-6)


def test_a_call_that_is_given_is_taken():
    found = probed(of(last_without), "model(ids)[0]")
    assert (found.call.expression, found.call.order) == ("model(ids)[0]", "b1v")


def noisy_unless_quiet(m, ids, quiet=None):
    return m.logits(ids) + (torch.rand(VOCAB) if quiet is None else 0)


# A forward of the logits, and its act that no decoder does.
BREACHES = {
    "later tokens": (lambda m, ids: m.logits(ids).flip(1), Kind.LOOK_AHEAD),
    "other rows": (lambda m, ids: m.logits(ids) - m.logits(ids).mean(0), Kind.ROWS),
    "chance": (lambda m, ids: m.logits(ids) + torch.rand(VOCAB), Kind.CHANCE),
    "chance that another call mends": (noisy_unless_quiet, Kind.CHANCE),
    "no numbers": (lambda m, ids: m.logits(ids) * torch.nan, Kind.UNKNOWN),
    "zeros": (lambda m, ids: torch.zeros_like(m.logits(ids)), Kind.UNKNOWN),
}


@pytest.mark.parametrize("name", BREACHES)
def test_what_a_decoder_does_not_do_is_seen(name):
    forward, kind = BREACHES[name]
    found = probed(of(forward))
    assert (found.call.expression, found.breaches[0].kind) == ("model(ids)", kind)
    assert len(found.breaches) == 1 or kind is Kind.LOOK_AHEAD


def test_a_module_without_logits_or_of_one_length_alone_is_refused_by_that():
    with pytest.raises(ContractError, match=r"it gives no logits .* --call"):
        probed(of(lambda m, ids: m.logits(ids).mean()))
    with pytest.raises(NoCacheError, match=f"accepts only {CONTEXT} tokens, the whole context, and no fewer") as caught:
        probed(of(lambda m, ids: m.logits(ids + torch.zeros(CONTEXT, dtype=torch.long))))
    assert [cause.kind for cause in caught.value.causes] == [Kind.FIXED]


def test_an_expression_knows_positions_and_masks_and_no_more_of_python():
    ids = torch.zeros((2, 3), dtype=torch.long)
    assert Call("positions").raw(nn.Module(), ids).tolist() == [[0, 1, 2]] * 2
    assert Call("future").raw(nn.Module(), ids).tolist() == (~Call("past").raw(nn.Module(), ids)).tolist()
    assert Call("future_scores").raw(nn.Module(), ids)[0].tolist() == [0, -torch.inf, -torch.inf]
    with pytest.raises(NameError):
        Call("open('x')").raw(nn.Module(), ids)


PLAIN = ("model(ids)", "model(ids, None)[0]", "model(ids.T, mask=future)['logits']", "model(ids).transpose(1, 2).log()")
NOT_PLAIN = (
    "torch.load('weights')", "model.save(ids)", "model.log(ids)", "ids.log()", "model(ids).tofile(ids)",
    "().__class__.__base__", "[model(ids) for _ in ids]", "(lambda: model(ids))()", "model(",
)  # fmt: skip


@pytest.mark.parametrize("expression", [*PLAIN, *NOT_PLAIN])
def test_a_plain_call_is_one_of_the_module_alone(expression):
    assert is_plain(expression) == (expression in PLAIN)


# --- what is proposed ---------------------------------------------------------------------------------------------
def asked_calls(module):
    """The calls that a refusal proposes; each works when it is typed."""
    with pytest.raises(InputError) as caught:
        probed(module)
    words = shlex.split(str(caught.value).rpartition(" with ")[2])
    calls = [call for flag, call in itertools.pairwise(words) if flag == "--call"]
    assert [probed(module, call).call.expression for call in calls] == calls
    return calls


# The calls that a refusal proposes.
ASKED = {
    "a flag that gives logits in place of hidden states": (
        ["model(ids, return_logits=True)", "model(ids)"],
        lambda m, ids, return_logits=False: m.logits(ids) if return_logits else m.token(ids)[..., :6],
    ),
    "quoted for a shell": (
        ['model(ids, ids)["it\'s $HOME"]', 'model(ids, None)["it\'s $HOME"]'],
        lambda m, ids, scale: {"it's $HOME": m.logits(ids) * (2 if scale is None else 1)},
    ),
    "two results": (["model(ids)[1]", "model(ids)[0]"], lambda m, ids: (m.token(ids), m.logits(ids))),
    "two named ones": (
        ["model(ids)['main_logits']", "model(ids)['draft_logits']"],
        lambda m, ids: {"draft_logits": m.token(ids), "main_logits": m.logits(ids)},
    ),
    "three": ([f"model(ids)[{i}]" for i in (2, 1, 0)], lambda m, ids: (m.token(ids), m.token(ids) * 2, m.logits(ids))),
    "the last beside all": (["model(ids)[1]", "model(ids)[0]"], lambda m, ids: (m.token(ids)[:, -1], m.logits(ids))),
    "across in a dictionary": (["model(ids)['out'].transpose(1, 2)"], lambda m, ids: {"out": m.logits(ids).mT}),
    "two of each token": (["model(ids)[:, :, 0]"], lambda m, ids: torch.stack([m.logits(ids), m.logits(ids) * 2], 2)),
    "two of each text": (["model(ids)[:, 0]"], lambda m, ids: torch.stack([m.logits(ids), m.logits(ids) * 2], 1)),
    "beside a part": (["model(ids)[1][:, :, 0]"], lambda m, ids: (m.logits(ids)[..., :4], m.logits(ids)[:, :, None])),
    "across, of one row": (["model(ids[0]).T"], lambda m, ids: one_row(m, ids).T),
    "probabilities": (["model(ids)[0].log()"], lambda m, ids: [m.logits(ids).softmax(-1)]),
    "with zeros": (["model(ids)[0].clamp_min(1e-30).log()"], lambda m, ids: [m.some_banned(ids).softmax(-1)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_logits_that_lie_otherwise_are_told_with_the_calls_that_work(name):
    calls, forward = ASKED[name]
    assert asked_calls(of(forward)) == calls
    assert all(map(is_plain, calls))


class SoftContract(NanoGpt):
    def forward(self, input_ids, position_ids):
        return super().forward(input_ids, position_ids).softmax(-1)


class SoftOwn(Gpt):
    def forward(self, ids):
        return super().forward(ids).softmax(-1)


@pytest.mark.parametrize("build", [SoftContract, lambda: SoftOwn(Causal)], ids=["of_the_contract", "own"])
def test_a_call_that_is_proposed_for_probabilities_gives_logits(build):
    module = drawn(build)
    with pytest.raises(InputError, match="returns probabilities") as caught:
        in_contract(module, CONTEXT, None, print)
    made = in_contract(module, CONTEXT, shlex.split(str(caught.value))[-1], print).module
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = module(ids, position_ids=ids) if isinstance(module, NanoGpt) else module(ids)
        assert torch.allclose(made(ids, position_ids=ids).softmax(-1), expected, atol=1e-6)
