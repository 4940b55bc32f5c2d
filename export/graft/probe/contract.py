"""Turns any module into one of the contract, forward(input_ids, position_ids) -> logits (B, T, V).

A module that already keeps the contract is used as it is. Any other module is followed along its time axis, through
its author's call.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pastkey.errors import ContractError, InputError, PastkeyError, first_line

from ...compare import LOGITS, logits_difference
from ..attention import failing_line
from ..states import StateError
from ..streamed import load, streaming
from ..time_axis.program.python_branches import heard
from ..time_axis.step.decoder import TimeAxisDecoder, find
from .call import CONTRACT, PLAIN, Call, find_call, plain_call, refuse_ambiguous
from .causes import Cause, Kind, NoCacheError, ObstacleError
from .observe import (
    Observation,
    Opaque,
    StandIn,
    UnkeptError,
    evaluating,
    name_of,
    observe,
    random_ids,
    require_finite,
    run_uncached,
)
from .proof import SHORTEST, Proof, prove
from .watched import HALF, without_autocast

Say = Callable[[str], None]

_MOST_FOLLOWED = 8192  # tokens of the longest context for which a latent row is looked for in a module of the contract
_CHOOSING = 11  # tokens of the sequences that show whether a module selects rows
_PLAIN = 128  # tokens of the longest sequence on which the plain call is compared


@dataclass(frozen=True)
class Contracted:
    """A module of the contract, and the facts that its runs showed."""

    module: nn.Module
    observation: Observation
    call: str = ""  # the author's call; empty if trying showed that the module keeps the contract
    proved: int = 0  # tokens of the longest text on which it was compared with the author's call


def in_contract(
    module: nn.Module, context_length: int, asked: str | None, say: Say, *, latents: bool = True, brief: bool = False
) -> Contracted:
    """Raises ContractError for a module that cannot have a cache, InputError for a call that does not fit.

    `latents`: whether a followed module may cache a latent row instead of keys and values. `brief`: compare it with
    the author's call on a short text only, since its export did so on long ones.
    """
    if isinstance(module, Opaque):
        if asked is not None:
            raise InputError(
                f"--call {asked} is for a module in Python, and {name_of(module)} is a graph: leave it out"
            )
        return Contracted(module, module.observed(context_length))
    with _as_it_was(), without_autocast() as entered:
        model = module if isinstance(module, StandIn) else _prepared(module, say)  # already a wrapper of ours
        with streaming(model):
            require_finite(model)
        kept, failed = _kept(model, context_length, brief=brief) if asked in (None, CONTRACT) else (None, None)
        if kept is None or entered:
            try:
                followed = _followed(model, context_length, asked, latents, brief=brief)
            except ContractError as error:
                if failed is None:
                    raise
                causes = error.causes if isinstance(error, NoCacheError) else ()
                raise NoCacheError(name_of(model), [*causes, failed]) from error
            if entered:
                say(f"{name_of(model)} computes under torch.autocast: it is exported in float32, without autocast")
            return followed
        if asked is None:
            _require_plain(model, Call(CONTRACT), context_length, kept.observation.vocab_size)
        if kept.observation.states:  # following would unroll the recurrences
            return dataclasses.replace(kept, call=asked or "")
        # Following caches each key/value head once, and traces experts that compute only their own tokens.
        repeats_heads, shares_channels = _heads_alike(kept, context_length)
        if repeats_heads or _chooses_rows(kept, context_length):
            with contextlib.suppress(ContractError, InputError):
                return _followed(model, context_length, CONTRACT, latents, brief=brief)
        elif latents and context_length <= _MOST_FOLLOWED and shares_channels:
            with contextlib.suppress(ContractError, InputError):
                followed = _followed(model, context_length, CONTRACT, latents, brief=brief)
                if _numbers(followed.observation) < _numbers(kept.observation):
                    return followed
        return dataclasses.replace(kept, call=asked or "")


def _kept(model: nn.Module, context_length: int, *, brief: bool) -> tuple[Contracted | None, Cause | None]:
    """The module as it is if it keeps the contract, else None; with the reason if only longer texts showed it."""
    try:
        parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return None, None
        observation = observe(model, context_length)
    except StateError:
        raise
    except (TypeError, ValueError, UnkeptError):
        return None, None
    try:
        proof = prove(model, model, Call(CONTRACT), observation, context_length, brief=brief)
    except Exception as error:  # a user's module may raise anything at some length or at these positions
        if not observation.states:
            return None, None
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ContractError(f"{name_of(model)} cannot be run with its states and compared ({told})") from error
    if not proof.differs:
        return Contracted(model, observation, proved=proof.longest), None
    what = f"gives other logits with a cache, {_told(proof)}"
    if observation.states:  # following would unroll the recurrences
        kept = "keys, values and the states of its recurrences"
        raise NoCacheError(name_of(model), [Cause(Kind.RECURRENCE, f"keeps more than {kept}: it {what}")])
    return None, Cause(Kind.UNKNOWN, what) if proof.differs > SHORTEST else None


def _told(proof: Proof) -> str:
    return (
        f"off by {proof.off:.1e} of the largest logit on a text of {proof.differs} tokens, the shortest that was found "
        f"to differ among lengths of up to {proof.longest}"
    )


def _heads_alike(kept: Contracted, context_length: int) -> tuple[bool, bool]:
    """Whether keys and values are repeated for the query heads; whether heads share channels of keys, as MLA's do."""
    run = run_uncached(kept.module, random_ids(1, min(4, context_length), kept.observation.vocab_size))
    several = [(k, v) for k, v in zip(run.keys, run.values, strict=True) if k.shape[1] > 1]
    repeated = any(torch.equal(k[:, 0], k[:, 1]) and torch.equal(v[:, 0], v[:, 1]) for k, v in several)
    return repeated, any(bool((k == k[:, :1]).all(2).all(1).any()) for k, _ in several)


def _numbers(observation: Observation) -> int:
    """How many numbers a cache holds for each token."""
    return sum(g.kv_heads * (g.key_head_size + g.value_head_size) for g in observation.geometry)


def _chooses_rows(kept: Contracted, context_length: int) -> bool:
    """Whether the module selects rows by token values, which torch cannot trace."""

    def run(ids: Tensor) -> Tensor:
        return run_uncached(kept.module, ids).logits

    with contextlib.suppress(Exception):  # if this run fails, the module is used as it is
        told = heard(run, min(_CHOOSING, context_length), kept.observation.vocab_size)
        return any(decision.rows is not None for decision in told.decisions)
    return False


def _followed(model: nn.Module, context_length: int, asked: str | None, latents: bool, *, brief: bool) -> Contracted:
    load(model)  # the rules read weights
    with evaluating(model):
        probed = find_call(model, context_length, asked)
        first = _few_logits(model, probed.call, probed.vocab_size)
        _run_whole(model, probed.call, context_length, probed.vocab_size)
        if not probed.breaches and not torch.equal(first, _few_logits(model, probed.call, probed.vocab_size)):
            what = f"gives a text other logits after a run over {context_length} tokens"
            raise NoCacheError(name_of(model), [Cause(Kind.STATE, what)])
        if asked is None and not probed.breaches:
            _require_plain(model, probed.call, context_length, probed.vocab_size)
        try:
            found = find(model, probed.call, context_length, probed.vocab_size, latents=latents)
        except NoCacheError as error:
            raise error.with_(probed.breaches) from error
        except PastkeyError:
            raise
        except Exception as error:  # torch may raise anything in cases that the rules miss
            told = f"cannot be followed ({type(error).__name__}: {first_line(error)[:200]})"
            causes = [Cause(Kind.UNKNOWN, told), *probed.breaches]
            raise NoCacheError(name_of(model), causes) from error
        if probed.breaches:
            raise NoCacheError(name_of(model), probed.breaches)
        decoder = TimeAxisDecoder(model, probed.call, found, context_length).eval()
        try:
            observation = observe(decoder, context_length)
            proof = prove(decoder, model, probed.call, observation, context_length, brief=brief)
        except ObstacleError as obstacle:
            raise NoCacheError(name_of(model), [obstacle.cause]) from obstacle
        except UnkeptError as error:
            causes = [Cause(Kind.UNKNOWN, f"was followed, but not to the end ({first_line(error)})")]
            raise NoCacheError(name_of(model), causes) from error
        if proof.differs:
            raise ContractError(
                f"{name_of(model)} was followed, and is {_told(proof)}: it computes differently for another "
                "length or text, or keeps values of an earlier call"
            )
        return Contracted(decoder, observation, probed.call.expression, proof.longest)


# --- the module as it was -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Restores the random states on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _widen(copies: Iterable[object]) -> None:
    """Sets each half-precision dtype that copied objects and dicts hold, such as a configuration's, to float32."""
    for value in copies:
        held = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for name, found in list(held.items()):
            if isinstance(found, torch.dtype) and found in HALF:
                held[name] = torch.float32


def _prepared(module: nn.Module, say: Say) -> nn.Module:
    """A copy on the CPU, whose runs leave the module unchanged. It shares parameters that are float32 on the CPU.

    If parameters are half precision, the copy's own dtype settings become float32 as well.
    """
    memo: dict[int, object] = {}
    moved: set[str] = set()
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            raise ContractError(f"{name_of(module)} is on the device meta, without numbers: load its weights first")
        if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
            memo[id(parameter)] = parameter
        elif parameter.is_floating_point():
            moved.add(f"{parameter.dtype} on {parameter.device}".removeprefix("torch."))
            copied = parameter.detach().to("cpu", torch.float32)
            memo[id(parameter)] = nn.Parameter(copied, requires_grad=False)
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # left by a run: deepcopy cannot copy it
                memo[id(value)] = value.detach()
    try:
        model = copy.deepcopy(module, memo)
    except Exception as error:
        raise ContractError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {first_line(error)}): leave out "
            "the part that cannot, such as a lock, an open file or a generator"
        ) from error
    if any(parameter.dtype in HALF for parameter in module.parameters()):
        _widen(value for value in memo.values() if not isinstance(value, Tensor))
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.device.type != "cpu":
                moved.add(f"{buffer.dtype} on {buffer.device}".removeprefix("torch."))
                part._buffers[name] = buffer.to("cpu")
    if moved:
        say(f"{name_of(module)} is {' and '.join(sorted(moved))}: it was copied to the CPU in float32")
    return model.eval()


def _run_whole(model: nn.Module, call: Call, context_length: int, vocab_size: int) -> None:
    """Runs the longest sequence once, which creates lazy tables. Raises InputError if it fails (a table too short)."""
    ids = random_ids(1, context_length, vocab_size)
    try:
        with torch.no_grad():
            call(model, ids)
    except Exception as error:
        where = failing_line(error)
        raise InputError(
            f"{name_of(model)} fails on {context_length} tokens, the context that was asked for"
            f"{f', at {where}' if where else ''} with {type(error).__name__}: {first_line(error)}; give the context "
            "that its tables and masks are made for with --context N"
        ) from error


def _few_logits(model: nn.Module, call: Call, vocab_size: int) -> Tensor:
    """The logits of a short text, empty for a call that does not accept one."""
    with contextlib.suppress(Exception), torch.no_grad():  # a user's module may raise anything
        return call(model, random_ids(1, 2, vocab_size))
    return torch.empty(0)


def _require_plain(model: nn.Module, taken: Call, context_length: int, vocab_size: int) -> None:
    """Raises InputError if the plain call fits and returns other logits than the call that was found by trying.

    Compares them on sequences of one, two and many tokens. The longest begins with ids that often mean padding.
    """
    with evaluating(model):
        # A wrapper of ours returns logits, so that its plain call need not be looked for.
        if isinstance(model, StandIn) and _agree(model, Call(PLAIN), taken, context_length, vocab_size):
            return
        plain = plain_call(model, context_length)
        if plain is not None and plain != taken and not _agree(model, plain, taken, context_length, vocab_size):
            refuse_ambiguous(model, plain, taken)


def _agree(model: nn.Module, plain: Call, taken: Call, context_length: int, vocab_size: int) -> bool:
    ids = random_ids(1, min(context_length, _PLAIN), vocab_size, seed=3)
    padded = torch.cat([torch.tensor([[0, 1, 2, 3, -2, -1]]) % vocab_size, ids], 1)[:, : ids.shape[1]]
    for text in (ids[:, :1], ids[:, :2], padded):
        try:
            expected, found = plain(model, text).float(), taken(model, text).float()
        except Exception:  # a user's module may raise anything at this length
            continue
        count = min(expected.shape[1], found.shape[1])  # either may return only the last position
        if expected.shape[2] != found.shape[2]:
            return False
        if not logits_difference(expected[:, -count:], found[:, -count:]) <= LOGITS:
            return False
    return True
