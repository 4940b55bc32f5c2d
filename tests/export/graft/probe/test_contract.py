"""Whatever a module is becomes one of the contract, or is refused in one sentence; it is left as it was."""

import contextlib
import itertools
import random
import re
import shlex
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pastkey.errors import ContractError, InputError
from pastkey.export.compare import logits_difference
from pastkey.export.graft.probe.call import Call
from pastkey.export.graft.probe.contract import in_contract
from pastkey.export.graft.probe.watched import without_autocast

from ....shared import divided
from ...decoders import NanoGpt, Plain
from ..own.blocks import Where
from ..own.parts import CONTEXT, VOCAB, WIDTH, Causal, Gpt, drawn
from ..own.registry import DECODERS, REFUSED
from ..plain import plain

SHORT = 12


def taken(module, context=SHORT, call=None):
    said = list[str]()
    return in_contract(module, context, call, said.append), said


def refusal(kind, module, context=SHORT, call=None):
    with pytest.raises(kind) as caught:
        taken(module, context, call)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def apart(found, reference):
    """Of the chosen module and the author's, as a part of the largest logit."""
    ids = torch.arange(SHORT)[None] % VOCAB
    with torch.no_grad():
        return logits_difference(reference(ids), found.module(ids, position_ids=torch.arange(SHORT)[None]))


# --- the two ways -------------------------------------------------------------------------------------------------
def test_a_module_that_keeps_the_contract_is_not_followed():
    found, said = taken(NanoGpt(context=SHORT))
    assert (found.call, said, found.proved) == ("", [], SHORT)
    assert isinstance(found.module, NanoGpt)


# The contract is kept only by the signature. No trace can go through the experts of the last one.
BY_SIGNATURE = {
    "positions are ignored": {
        "embed": lambda m, input_ids, position_ids: m.token(input_ids) + m.position(torch.arange(input_ids.shape[1]))
    },
    "a tuple": {"logits": lambda m, hidden: (m.head(hidden), None)},
    "the last alone": {"logits": lambda m, hidden: m.head(hidden[:, -1:])},
    "experts": {
        "more": lambda m: setattr(m, "experts", Where(m.head.in_features)),
        "logits": lambda m, hidden: m.head(hidden + m.experts(hidden)),
    },
}


@pytest.mark.parametrize("name", divided(BY_SIGNATURE, quick=["positions are ignored"], ci=BY_SIGNATURE))
def test_a_module_that_keeps_the_contract_by_its_signature_alone_is_followed(name):
    found, _ = taken(plain(BY_SIGNATURE[name]))
    assert found.call.startswith("model(ids, position_ids=positions)")


# --- the plain call -----------------------------------------------------------------------------------------------
def counted(ids):
    return torch.arange(ids.shape[1]).expand_as(ids)


def run(m, ids, given, own):
    """With the positions that are given, or the module's own."""
    return Plain.forward(m, ids, own if given is None else given)


OTHERWISE = {  # forward with other positions than 0, 1, 2 and so on
    "from 2": lambda m, input_ids, position_ids=None: run(m, input_ids, position_ids, counted(input_ids) + 2),
    "in others": lambda m, input_ids, **others: run(m, input_ids, others.get("position_ids"), counted(input_ids) + 1),
    "followed in any call": lambda m, input_ids, mask=None, position_ids=None: {
        "logits": run(m, input_ids, position_ids, counted(input_ids) + 2)
    },
    "the last unless targets": lambda m, input_ids, position_ids=None, targets=None: run(
        m, input_ids, position_ids, counted(input_ids) + 2
    )[:, 0 if targets is not None else -1 :],
}


@pytest.mark.parametrize("name", divided(OTHERWISE, quick=["from 2", "followed in any call"], ci=OTHERWISE))
def test_positions_that_change_the_plain_logits_are_asked_about(name):
    """Each of the two calls that the sentence offers is then taken, and rows of different lengths may share a batch."""
    module, ids = plain({"forward": OTHERWISE[name]}), torch.arange(SHORT)[None]
    words = shlex.split(refusal(InputError, module).partition("choose one with")[2])
    calls = [call for flag, call in itertools.pairwise(words) if flag == "--call"]
    assert sorted(call.startswith("model(ids, position_ids=positions)") for call in calls) == [False, True]
    for call in calls:
        found, _ = taken(module, call=call)
        with torch.no_grad():
            expected = Call(call).raw(module, ids)
            logits = found.module(ids, position_ids=counted(ids))
        assert found.call == call
        assert found.observation.padding
        assert torch.allclose(logits[:, -expected.shape[1] :], expected, atol=1e-4)


def ahead_unless_given(m, input_ids, position_ids=None):
    logits = run(m, input_ids, position_ids, counted(input_ids))
    return logits + logits.mean(1, keepdim=True) if position_ids is None else logits


AGREEING = {
    "optional": lambda m, input_ids, position_ids=None: run(m, input_ids, position_ids, counted(input_ids)),
    "among others": lambda m, input_ids, **others: run(m, input_ids, others.get("position_ids"), counted(input_ids)),
    "the plain call fails": lambda m, input_ids, position_ids=None: run(m, input_ids, position_ids, None),
    "the plain call is no decoder's": ahead_unless_given,
}


@pytest.mark.parametrize("name", divided(AGREEING, quick=["optional"], ci=AGREEING))
def test_the_contract_is_taken_where_no_plain_call_gives_other_logits(name):
    for call in (None, "model(ids, position_ids=positions)"):
        found, _ = taken(plain({"forward": AGREEING[name]}), call=call)
        assert isinstance(found.module, Plain)
        assert found.observation.padding
        assert found.call == (call or "")


# --- refused ------------------------------------------------------------------------------------------------------
class OtherwiseWhenLong(Gpt):
    """As a module whose angles change beyond a length."""

    def embed(self, idx):
        return super().embed(idx) * (2 if idx.shape[1] > 700 else 1)


def seen_whole(m, input_ids, position_ids):
    """Every token sees whether there are more than twenty."""
    beyond = (torch.ones_like(input_ids).sum(1) - 20).clamp(min=0)
    return Plain.embed(m, input_ids, position_ids) + 0.1 * beyond[:, None, None]


class Grows(Gpt):
    """Makes its table again for a longer text, by other numbers, and keeps it: cached dynamic NTK."""

    longest = 16

    def embed(self, idx):
        self.longest = max(self.longest, idx.shape[1])
        return super().embed(idx) + (self.longest - 16) * torch.linspace(-1, 1, WIDTH)


class AnyDtype(Gpt):
    """Converts to a dtype from where its author keeps it, in the middle."""

    def __init__(self, settings, dtype_of):
        super().__init__(Causal, layers=1)
        self.settings, self.dtype_of = settings, dtype_of
        self.to(torch.float16)

    def forward(self, idx):
        x = self.embed(idx).to(self.dtype_of(self.settings))
        return self.lm_head(self.ln_f(self.blocks[0](x)))


def placed(own):
    """A module that has its own positions where none are given."""
    return plain({"forward": lambda m, input_ids, position_ids=None: run(m, input_ids, position_ids, own(input_ids))})


def usual():
    return Gpt(Causal).eval()


FOLLOWED_OFF = (
    r"was followed, and is off by \S+ of the largest logit on a text of 701 tokens, the shortest that was found to "
    "differ among lengths of up to 720: "
)
OF_LENGTH = r"test_contract.py:\d+ computes with a number made from the length of the text.* on a text of 21 tokens"
HALF = r"could not be run as .* at parts\.py:\d+: RuntimeError: .*same dtype"
BOTH_CALLS = re.escape("runs as model(ids) and as model(ids, position_ids=positions)")
NO_RUN = "could not be run as "
REASONS: dict[str, Any] = {  # class, module, pattern of the sentence, and the context and the call asked for
    "other numbers for long texts": (
        ContractError, lambda: OtherwiseWhenLong(Causal, context=720).eval(), FOLLOWED_OFF, 720
    ),
    "its line and the shortest text that differs": (ContractError, lambda: plain({"embed": seen_whole}), OF_LENGTH, 40),
    "what a long run leaves behind": (
        ContractError, lambda: Grows(Causal).eval(), "other logits after a run over 48 tokens", CONTEXT
    ),
    "half precision that the code makes": (ContractError, lambda: AnyDtype(None, lambda _: torch.float16).eval(), HALF),
    "no numbers": (ContractError, lambda: usual().to("meta"), "device meta"),
    "no copy": (
        ContractError, lambda: plain({"more": lambda m: setattr(m, "lock", threading.Lock())}), "cannot be copied"
    ),
    "a context beyond the tables": (
        InputError, usual, "fails on 49 tokens, the context that was asked for, at .* with --context N", CONTEXT + 1
    ),
    "other positions of one token alone": (
        InputError, lambda: placed(lambda ids: counted(ids) + (3 if ids.shape[1] == 1 else 0)), BOTH_CALLS
    ),
    "other positions of padding alone": (
        InputError, lambda: placed(lambda ids: ((ids != 0).cumsum(1) - 1).clamp(min=0)), BOTH_CALLS
    ),
    "a call that is no Python": (
        InputError, usual, NO_RUN + r"model\(ids: SyntaxError.* --call \"model", SHORT, "model(ids"
    ),
    "a call of no logits": (InputError, usual, NO_RUN + "ids: it gives no logits", SHORT, "ids"),
}  # fmt: skip
LONG = "other numbers for long texts"


@pytest.mark.parametrize("name", divided(REASONS, quick={*REASONS} - {LONG}, ci=[LONG]))
def test_a_module_is_refused_with_its_reason(name):
    kind, build, words, *asked = REASONS[name]
    assert re.search(words, refusal(kind, build(), *asked))


# --- other precisions ---------------------------------------------------------------------------------------------
def test_another_precision_is_taken_in_float32_and_said():
    module = usual().to(torch.bfloat16)
    found, said = taken(module)
    assert said == ["Gpt is bfloat16 on cpu: it was copied to the CPU in float32"]
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    assert apart(found, module.float()) < 1e-5


def test_half_precision_in_settings_becomes_float32_in_the_copy_alone():
    def dtype_of(settings):
        return settings.kinds["dtype"]

    module = AnyDtype(SimpleNamespace(kinds={"dtype": torch.float16}), dtype_of).eval()
    found, said = taken(module)
    assert (found.call, len(said)) == ("model(ids)", 1)
    assert dtype_of(module.settings) == torch.float16
    reference = AnyDtype(None, lambda _: torch.float32).float()
    assert apart(found, reference.eval()) > 1e-3  # of other weights
    reference.load_state_dict(module.state_dict())
    assert apart(found, reference) < 1e-5


class Mixed(Gpt):
    def forward(self, idx):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(idx)


class MixedMlp(Plain):
    """Of the contract, but for an MLP in mixed precision."""

    def logits(self, hidden):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = hidden + F.linear(hidden, self.head.weight).mean(-1, keepdim=True)
        return super().logits(hidden)


def test_autocast_is_left_out_and_said():
    module, reference = Mixed(Causal).eval(), usual()
    reference.load_state_dict(module.state_dict())
    found, said = taken(module)
    assert said == ["Mixed computes under torch.autocast: it is exported in float32, without autocast"]
    assert apart(found, reference) < 1e-5
    with found.module.native():
        assert apart(found, reference) == 0
    assert not torch.is_autocast_enabled("cpu")
    found, said = taken(MixedMlp(vocab=VOCAB))
    assert (found.call, len(said)) == ("model(ids, position_ids=positions)", 1)


def test_autocast_of_another_thread_stays():
    def half():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    with without_autocast(), ThreadPoolExecutor(1) as other:
        assert half() is torch.float32
        assert other.submit(half).result() is torch.bfloat16
        assert not other.submit(torch.is_autocast_enabled, "cpu").result()


# --- as it was ----------------------------------------------------------------------------------------------------
def state_of(module):
    """All that an export might change."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        "tensors": {n: (id(t), t.dtype, t.device, t.requires_grad, id(t.grad)) for n, t in tensors},
        "numbers": {n: t.tolist() for n, t in tensors},
        "modes": [part.training for part in module.modules()],
        "attributes": [{n: id(v) for n, v in vars(part).items() if n != "training"} for part in module.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
        "torch": (F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()),
        "patched": (nn.Module.__setattr__, torch.fx.proxy.TracerBase._filter_traceback_frames),
        "random": [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()],
    }


AS_IT_WAS = {
    "of_the_contract": lambda: NanoGpt(context=SHORT),
    "half_precision": lambda: drawn(lambda: Gpt(Causal).half()),
    **{name: DECODERS[name].make for name in ("filled_in_place", "rotary_kept")},
    **{name: REFUSED[name].make for name in ("little_noise", "memory", "cache_in_place")},
}


@pytest.mark.parametrize(
    "name", divided(AS_IT_WAS, quick=["of_the_contract", "filled_in_place", "little_noise"], ci=AS_IT_WAS)
)
def test_a_module_is_as_it_was_whether_taken_or_refused(name):
    module = AS_IT_WAS[name]().train()
    first = next(iter(module.children()))
    first.eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = state_of(module)
    with pytest.raises(ContractError) if name in REFUSED else contextlib.nullcontext():
        taken(module)
    assert state_of(module) == before
