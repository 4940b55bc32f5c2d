"""How a module is called is found by trying, or given."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pastkey.errors import ContractError, InputError
from pastkey.export.graft.probe.call import Call, Probed, find_call, is_plain
from pastkey.export.graft.probe.causes import Kind, NoCacheError
from pastkey.export.graft.probe.contract import in_contract

from ...decoders import NanoGpt
from ..own.parts import Gpt, drawn
from ..own.positions import Causal

VOCAB, CONTEXT = 11, 12


class Counted(nn.Module):
    """Logits of the mean of all tokens so far: a decoder without attention."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.token = nn.Embedding(VOCAB, 6)
            self.head = nn.Linear(6, VOCAB)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        x = self.token(ids)
        return self.head(torch.tanh(x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]))

    def forward(self, ids: Tensor) -> Any:
        return self.logits(ids)


@dataclass
class Output:
    loss: None
    logits: Tensor


class Tupled(Counted):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        return self.logits(ids) if targets is not None else self.logits(ids)[:, [-1]], None


class InDictionary(Counted):
    def forward(self, ids: Tensor) -> Any:
        return {"hidden": self.token(ids), "out": [self.logits(ids)]}


class InDataclass(Counted):
    def forward(self, ids: Tensor) -> Any:
        return Output(None, self.logits(ids))


class TimeFirst(Counted):
    def forward(self, ids: Tensor) -> Any:
        assert ids.dim() == 2
        return self.logits(ids.T).transpose(0, 1)


class OneRow(Counted):
    def forward(self, ids: Tensor) -> Any:
        (length,) = ids.shape
        return self.logits(ids.reshape(1, length))[0]


class LastOnly(Counted):
    def forward(self, ids: Tensor) -> Any:
        return self.logits(ids)[:, -1]


class WithStart(Counted):
    def forward(self, ids: Tensor, start_pos: int) -> Any:  # type: ignore[override]
        return self.logits(ids) + (torch.arange(ids.shape[1]) + start_pos)[:, None] * 0.01


class LastUnlessTargets(Counted):
    """Has its targets behind positions, which are no place for ids."""

    def forward(self, ids: Tensor, position_ids: Tensor | None = None, targets: Tensor | None = None) -> Any:
        logits = self.logits(ids) if position_ids is None else self.logits(ids) + position_ids[..., None] * 0
        return logits if targets is not None else logits[:, -1]


class OneRowWithPositions(OneRow):
    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        return logits if position_ids is None else logits + position_ids[..., None]


class WithMask(Counted):
    """Looks ahead unless a mask is given."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        x = self.token(ids)
        scores = torch.zeros(ids.shape[1], ids.shape[1]) + (0.0 if mask is None else mask)
        return self.head(torch.tanh(scores.softmax(-1) @ x))


class BatchOfOne(Counted):
    def forward(self, ids: Tensor) -> Any:
        assert len(ids) == 1
        return self.logits(ids)


class BatchOfOneLast(BatchOfOne):
    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids)[:, -1]


class BatchOfOneWithTargets(BatchOfOne):
    def forward(self, ids: Tensor, targets: Tensor) -> Any:  # type: ignore[override]
        assert ids.shape == targets.shape
        return None, super().forward(ids)


class FirstRow(Counted):
    def forward(self, ids: Tensor) -> Any:
        return self.logits(ids[:1])[0]


class FirstRowLast(FirstRow):
    def forward(self, ids: Tensor) -> Any:
        assert len(ids) == 1
        return super().forward(ids)[-1]


class Squeezed(Counted):
    def forward(self, ids: Tensor) -> Any:
        return self.logits(ids).squeeze()


class TimeFirstWithMask(WithMask):
    """(T, B), and the mask is given."""

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(ids.T, mask).transpose(0, 1)


FOUND: dict[type[Counted], tuple[str, str]] = {
    Counted: ("model(ids)", "btv"),
    Tupled: ("model(ids, ids)[0]", "btv"),
    InDictionary: ("model(ids)['out'][0]", "btv"),
    InDataclass: ("model(ids).logits", "btv"),
    TimeFirst: ("model(ids.T)", "tbv"),
    OneRow: ("model(ids[0])", "tv"),
    LastOnly: ("model(ids)", "bv"),
    LastUnlessTargets: ("model(ids, targets=ids)", "btv"),
    OneRowWithPositions: ("model(ids[0])", "tv"),
    WithStart: ("model(ids, 0)", "btv"),
    WithMask: ("model(ids, mask=future_scores)", "btv"),
    TimeFirstWithMask: ("model(ids.T, mask=future_scores)", "tbv"),
    BatchOfOne: ("model(ids[:1])", "btv"),
    BatchOfOneLast: ("model(ids[:1])", "bv"),
    BatchOfOneWithTargets: ("model(ids[:1], ids[:1])[1]", "btv"),
    FirstRow: ("model(ids[:1])", "tv"),
    FirstRowLast: ("model(ids[:1])", "v"),
    Squeezed: ("model(ids)", "btv"),
}


def probed(module: nn.Module, asked: str | None = None) -> Probed:
    return find_call(module.eval(), CONTEXT, asked)


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_the_call_is_found_and_how_the_logits_lie(kind):
    module = kind()
    found = probed(module)
    expression, order = FOUND[kind]
    assert (found.call.expression, found.call.order) == (expression, order)
    assert (found.vocab_size, found.breaches) == (VOCAB, ())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = found.call(module, ids)
    assert logits.shape == (1, 6 if "t" in order else 1, VOCAB)
    if kind not in (WithStart, WithMask, TimeFirstWithMask):
        with torch.no_grad():
            assert torch.allclose(logits[:, -1], module.logits(ids)[:, -1], atol=1e-6)


def test_a_call_that_is_given_is_taken():
    found = probed(Tupled(), "model(ids)[0]")
    assert (found.call.expression, found.call.order) == ("model(ids)[0]", "b1v")


def test_a_call_that_is_to_be_typed_is_quoted_for_a_shell():
    class Quoted(Counted):
        def forward(self, ids: Tensor, scale: Any) -> Any:  # type: ignore[override]
            return {"it's $HOME": self.logits(ids) * (2 if scale is None else 1)}

    with pytest.raises(InputError) as caught:
        probed(Quoted())
    words = shlex.split(str(caught.value).partition("say which with")[2])
    calls = [call for flag, call in itertools.pairwise(words) if flag == "--call"]
    assert calls == ['model(ids, ids)["it\'s $HOME"]', 'model(ids, None)["it\'s $HOME"]']
    assert [probed(Quoted(), call).call.expression for call in calls] == calls


class NoisyUnlessTold(Counted):
    """Its argument is neither targets nor a mask."""

    def forward(self, ids: Tensor, quiet: Tensor | None = None) -> Any:
        return self.logits(ids) + (torch.rand(VOCAB) if quiet is None else 0)


def test_a_plain_call_that_is_random_is_mended_by_no_other():
    found = probed(NoisyUnlessTold())
    assert (found.call.expression, [cause.kind for cause in found.breaches]) == ("model(ids)", [Kind.CHANCE])


def breach(change: Callable[[Tensor], Tensor]) -> list[Kind]:
    class Broken(Counted):
        def forward(self, ids: Tensor) -> Any:
            return change(self.logits(ids))

    return [cause.kind for cause in probed(Broken()).breaches]


def test_what_a_decoder_does_not_do_is_seen():
    assert breach(lambda x: x.flip(1))[0] == Kind.LOOK_AHEAD
    assert breach(lambda x: x - x.mean(0)) == [Kind.ROWS]
    assert breach(lambda x: x + torch.rand_like(x)) == [Kind.CHANCE]
    assert breach(lambda x: x * torch.nan) == [Kind.UNKNOWN]
    assert breach(torch.zeros_like) == [Kind.UNKNOWN]


def test_a_module_that_gives_no_logits_is_refused_with_what_to_type():
    class Loss(Counted):
        def forward(self, ids: Tensor) -> Any:
            return self.logits(ids).mean()

    with pytest.raises(ContractError, match=r"it gives no logits .* --call"):
        probed(Loss())


def test_a_module_of_one_length_alone_is_refused_by_that():
    class Whole(Counted):
        def forward(self, ids: Tensor) -> Any:
            return self.logits(ids + torch.zeros(CONTEXT, dtype=torch.long))

    with pytest.raises(NoCacheError) as caught:
        probed(Whole())
    assert [cause.kind for cause in caught.value.causes] == [Kind.FIXED]


def test_an_expression_knows_positions_and_masks_and_no_more_of_python():
    ids = torch.zeros((2, 3), dtype=torch.long)
    assert Call("positions").raw(nn.Module(), ids).tolist() == [[0, 1, 2]] * 2
    assert Call("future").raw(nn.Module(), ids).tolist() == (~Call("past").raw(nn.Module(), ids)).tolist()
    assert Call("future_scores").raw(nn.Module(), ids)[0].tolist() == [0, -torch.inf, -torch.inf]
    with pytest.raises(NameError):
        Call("open('x')").raw(nn.Module(), ids)


@pytest.mark.parametrize(
    "expression",
    ["model(ids)", "model(ids, None)[0]", "model(ids.T, mask=future)['logits']", "model(ids)[0].transpose(1, 2).log()"],
)
def test_a_call_of_the_module_alone_is_plain(expression):
    assert is_plain(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "torch.load('weights')",
        "torch.ops.load_library",
        "model.save(ids)",
        "model.log(ids)",
        "ids.log()",
        "model(ids).tofile(ids)",
        "model.__class__",
        "().__class__.__base__",
        "[model(ids) for _ in ids]",
        "(lambda: model(ids))()",
        "model(",
    ],
)
def test_a_call_that_does_more_is_not_plain(expression):
    assert not is_plain(expression)


def asked_calls(module: nn.Module) -> list[str]:
    """The calls that a refusal proposes; each works when it is typed."""
    with pytest.raises(InputError) as caught:
        probed(module)
    words = shlex.split(str(caught.value).rpartition(" with ")[2])
    calls = [call for flag, call in itertools.pairwise(words) if flag == "--call"]
    assert [probed(module, call).call.expression for call in calls] == calls
    return calls


class Wide(Counted):
    """As wide as its vocabulary."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.token = nn.Embedding(VOCAB, VOCAB)
            self.head = nn.Linear(VOCAB, VOCAB)
        self.make = make

    def forward(self, ids: Tensor) -> Any:
        return self.make(self.token(ids), self.logits(ids))


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (lambda hidden, logits: (hidden, logits), "[1] [0]"),
        (lambda hidden, logits: (logits, None, hidden), "[2] [0]"),
        (lambda hidden, logits: {"hidden": hidden, "out": logits}, "['out'] ['hidden']"),
        (lambda hidden, logits: {"draft_logits": hidden, "main_logits": logits}, "['main_logits'] ['draft_logits']"),
        (lambda hidden, logits: (hidden, hidden * 2, logits), "[2] [1] [0]"),
        (lambda hidden, logits: (hidden[:, -1], logits), "[1] [0]"),
    ],
)
def test_two_results_that_may_both_be_the_logits_are_asked_for(make, places):
    assert asked_calls(Wide(make)) == [f"model(ids){place}" for place in places.split()]


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda hidden, logits: {"hidden": hidden, "logits": logits}, "['logits']"),
        (lambda hidden, logits: {"draft_logits": hidden, "logits": logits}, "['logits']"),
        (lambda hidden, logits: {"hidden": hidden, "lm_logits": logits}, "['lm_logits']"),
        (lambda hidden, logits: {"router_logits": hidden[..., :4], "out": logits}, "['out']"),
        (lambda hidden, logits: (logits, logits.clone()), "[0]"),
        (lambda hidden, logits: (logits, logits.mean()), "[0]"),
        (lambda hidden, logits: (logits[:, -1], logits), "[1]"),
        (lambda hidden, logits: (logits.log_softmax(-1), logits), "[0]"),
        (lambda hidden, logits: (logits.softmax(-1), logits), "[1]"),
        (lambda hidden, logits: (hidden.flip(1), logits), "[1]"),
    ],
)
def test_one_result_that_alone_can_be_the_logits_is_taken(make, place):
    assert probed(Wide(make)).call.expression == f"model(ids){place}"


@pytest.mark.parametrize("zeros", [0, 3])
def test_probabilities_are_told_from_logits(zeros):
    class Sampled(Counted):
        def forward(self, ids: Tensor) -> Any:
            seen = torch.arange(VOCAB) < VOCAB - zeros
            return [self.logits(ids).masked_fill(~seen, -torch.inf).softmax(-1)]

    (call,) = asked_calls(Sampled())
    assert call == ("model(ids)[0].clamp_min(1e-30).log()" if zeros else "model(ids)[0].log()")
    assert is_plain(call)


class Soft(nn.Module):
    """Probabilities in place of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class SoftContract(Soft):
    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, position_ids)
        return logits.softmax(-1)


class SoftOwn(Soft):
    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids)
        return logits.softmax(-1)


@pytest.mark.parametrize("contract", [True, False])
def test_a_call_that_is_proposed_for_probabilities_gives_logits(contract):
    module = SoftContract(NanoGpt().eval()) if contract else SoftOwn(drawn(lambda: Gpt(Causal)))
    with pytest.raises(InputError, match="gives probabilities") as caught:
        in_contract(module, CONTEXT, None, print)
    made = in_contract(module, CONTEXT, shlex.split(str(caught.value))[-1], print).module
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = module(ids, position_ids=ids) if contract else module(ids)
        assert torch.allclose(made(ids, position_ids=ids).softmax(-1), expected, atol=1e-6)


class OnRequest(Counted):
    """Its logits are made if they are asked for, as a flag or as an argument that must be given."""

    def forward(self, ids: Tensor, targets: Tensor | None = None, *, get_logits: bool = False) -> Any:
        return {"logits": self.logits(ids) if get_logits else None, "loss": None}


class WithoutFlag(Counted):
    def forward(self, ids: Tensor, skip_logits: bool = True) -> Any:
        return None if skip_logits else self.logits(ids)


class Required(Counted):
    def forward(self, ids: Tensor, return_logits: bool) -> Any:  # type: ignore[override]
        return self.logits(ids) if return_logits is True else None


class Scaled(Counted):
    def forward(self, ids: Tensor, scale_logits: bool = False) -> Any:
        return self.logits(ids) * (2 if scale_logits else 1)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (OnRequest, "model(ids, get_logits=True)['logits']"),
        (WithoutFlag, "model(ids, skip_logits=False)"),
        (Required, "model(ids, True)"),
        (Scaled, "model(ids)"),
    ],
)
def test_a_flag_that_asks_for_logits_is_tried(kind, call):
    assert probed(kind()).call.expression == call


def test_a_flag_that_gives_logits_in_place_of_hidden_states_is_asked_for():
    class Hidden(Counted):
        def forward(self, ids: Tensor, return_logits: bool = False) -> Any:
            return self.logits(ids) if return_logits else self.token(ids)

    assert asked_calls(Hidden()) == ["model(ids, return_logits=True)", "model(ids)"]


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda logits: logits.transpose(1, 2), "model(ids).transpose(1, 2)"),
        (lambda logits: {"out": logits.mT}, "model(ids)['out'].transpose(1, 2)"),
        (lambda logits: torch.stack([logits, logits * 2], 2), "model(ids)[:, :, 0]"),
        (lambda logits: torch.stack([logits, logits * 2], 1), "model(ids)[:, 0]"),
        (lambda logits: (logits[..., :4], logits[:, :, None]), "model(ids)[1][:, :, 0]"),
    ],
)
def test_logits_whose_axes_stand_otherwise_are_told_with_the_call_that_works(make, call):
    class Laid(Counted):
        def forward(self, ids: Tensor) -> Any:
            return make(self.logits(ids))

    assert asked_calls(Laid()) == [call]
    assert is_plain(call)


def test_logits_of_one_row_that_stand_across_are_told_with_the_call_that_works():
    class Across(Counted):
        def forward(self, ids: Tensor) -> Any:
            (_,) = ids.shape
            return self.logits(ids[None])[0].T

    assert asked_calls(Across()) == ["model(ids[0]).T"]
