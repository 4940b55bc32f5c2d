"""Runs a module to learn the contents of its cache, and whether it keeps the contract.

The KV geometry comes from the tensors that the attention calls receive, not from names in a configuration. A module
that breaks the contract is followed along its time axis instead. Users see only an UnkeptError of the followed module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pastkey.contract.bundle import KVGeometry, RowsGeometry, StateGeometry
from pastkey.errors import ContractError, NumericsError, PastkeyError, first_line

from ..attention import (
    AttentionCall,
    Handler,
    RowsCall,
    RowsHandler,
    attention_over,
    embedding,
    intercept,
    torch_attention,
    visible,
)
from ..states import StateCall, StateHandler
from ..streamed import streaming
from .logits import is_distribution

_SEED = 0
_MASKED = -1e4  # a masked score at or below it gets weight 0: its exp is 0 in float32


class UnkeptError(Exception):
    """The module breaks the contract, forward(input_ids, position_ids) -> logits (B, T, V)."""


@dataclass(frozen=True)
class CacheLayer:
    """One attention call, in order of execution. A block applied several times is several layers."""

    geometry: KVGeometry
    heads: int  # H
    where: str  # file:line of the call
    window: int | None = None  # number of tokens that a token attends to, if attention is local
    special: str | None = None  # the feature that GroupQueryAttention cannot compute
    padding: bool = True  # whether rows of different lengths may share a batch
    attributes: tuple[str, ...] = ()  # names of the GroupQueryAttention attributes for it


@dataclass(frozen=True)
class Observation:
    """The facts that runs of the module showed."""

    layers: tuple[CacheLayer, ...]
    vocab_size: int  # V, the width of the logits
    rows: tuple[RowsGeometry, ...] = ()  # cached in addition to keys and values
    states: tuple[StateGeometry, ...] = ()  # kept in addition to these

    @property
    def padding(self) -> bool:
        """Whether rows of different lengths may share a batch."""
        return not self.rows and not self.states and all(layer.padding for layer in self.layers)

    @property
    def geometry(self) -> tuple[KVGeometry, ...]:
        return tuple(layer.geometry for layer in self.layers)


@dataclass
class Uncached:
    """The slow, simple reference run: logits (B, T, V), each layer's keys and values, rows and states."""

    logits: Tensor
    length: int = 0  # tokens so far, T and those before
    keys: list[Tensor] = field(default_factory=list)  # per layer (B, K, T, D)
    values: list[Tensor] = field(default_factory=list)  # per layer (B, K, T, Dv)
    rows: list[Tensor] = field(default_factory=list)  # per RowsCall (B, T, F)
    states: list[Tensor] = field(default_factory=list)  # per StateCall (B, ...)


# --- running ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def evaluating(module: nn.Module, *, traced: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, with the module's stored weights unless it is only traced.

    Restores every submodule's mode on exit.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), contextlib.nullcontext() if traced else streaming(module):
            yield
    finally:
        for child, mode in modes:
            child.training = mode


class Opaque(nn.Module):
    """A module of the contract that computes outside of torch, and reports the inputs of its attention calls itself."""

    takes_positions: bool  # whether it computes with the position_ids that it is given

    def uncached(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Uncached:
        """As `run_uncached`."""
        raise NotImplementedError

    def observed(self, context_length: int) -> Observation:
        """As `observe`."""
        raise NotImplementedError

    def graph(self, form: str, observation: Observation) -> tuple[ir.Model, Observation]:
        """Returns the "fused" or "standard" graph, and its observation."""
        raise NotImplementedError

    def rounding(self, ids: npt.NDArray[np.int64]) -> float:
        """Returns max |difference| over the largest between logits of ids (T,) in two paths of the same numbers."""
        raise NotImplementedError


def run_uncached(module: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Uncached:
    """Runs the module as it is on ids (B, T), and records the inputs of its attention calls."""
    if isinstance(module, Opaque):
        return module.uncached(input_ids, position_ids)
    result = Uncached(torch.empty(0))

    def keep(call: AttentionCall) -> Tensor:
        result.keys.append(call.key)
        result.values.append(call.value)
        return torch_attention(call)

    def keep_rows(call: RowsCall) -> Tensor:
        result.rows.append(call.rows)
        return call.rows

    def keep_state(call: StateCall) -> Tensor:
        output, state = call.over(None)
        result.states.append(state)
        return output

    result.logits = _call(module, input_ids, position_ids, keep, keep_rows, keep_state)
    result.length = input_ids.shape[1]
    return result


def run_on(module: nn.Module, past: Uncached, input_ids: Tensor) -> Uncached:
    """Runs new ids (B, T) only; the calls also get the keys, values, rows and states of `past`.

    Returns those of all tokens so far, the past of the next tokens, with the new logits.
    """
    length = past.length + input_ids.shape[1]
    layer, rows, states = iter(zip(past.keys, past.values, strict=True)), iter(past.rows), iter(past.states)
    result = Uncached(torch.empty(0), length)

    def attend(call: AttentionCall) -> Tensor:
        key, value = (torch.cat([old, new], 2) for old, new in zip(next(layer), (call.key, call.value), strict=True))
        result.keys.append(key)
        result.values.append(value)
        return attention_over(call, key, value)

    def extend_rows(call: RowsCall) -> Tensor:
        result.rows.append(torch.cat([next(rows)[:, -call.keep :], call.rows], 1))
        return result.rows[-1]

    def go_on(call: StateCall) -> Tensor:
        output, state = call.over(next(states))
        result.states.append(state)
        return output

    positions = torch.arange(past.length, length).expand_as(input_ids)
    result.logits = _call(module, input_ids, positions, attend, extend_rows, go_on)
    return result


def _call(
    module: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None,
    handler: Handler,
    rows: RowsHandler,
    states: StateHandler,
) -> Tensor:
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    with evaluating(module), intercept(handler, rows=rows, states=states):
        logits = module(input_ids, position_ids=position_ids)
    assert isinstance(logits, Tensor)
    return logits.float()


# --- observing ----------------------------------------------------------------------------------------------------
def observe(module: nn.Module, context_length: int) -> Observation:
    """Runs the module at two shapes, three if it passes masks, and checks that it keeps the contract.

    Raises UnkeptError if it does not.
    """
    longest = min(7, context_length)
    vocab_size = _probe_vocabulary(module, longest, context_length)
    runs = [_Observer(module, batch, length, vocab_size) for batch, length in ((2, longest), (3, max(2, longest - 2)))]
    if runs[0].masked:  # a window shows only if the sequence is longer
        runs.append(_Observer(module, 1, context_length, vocab_size))
    layers = _attention_layers(module, runs)
    return Observation(layers, vocab_size, tuple(runs[0].rows), tuple(runs[0].states))


def _attention_layers(module: nn.Module, runs: list[_Observer]) -> tuple[CacheLayer, ...]:
    """The attention calls. Raises UnkeptError if nothing is kept, or if they differ between lengths."""
    first = runs[0].layers
    if not first and not runs[0].states:
        raise UnkeptError(f"{name_of(module)} made no call of F.scaled_dot_product_attention")
    for run in runs[1:]:
        if [a.geometry for a in first] != [b.geometry for b in run.layers] or runs[0].states != run.states:
            raise UnkeptError(f"{name_of(module)} makes different attention calls for different lengths")
    return tuple(first)


def random_ids(count: int, length: int, vocab_size: int, seed: int = _SEED) -> Tensor:
    """(count, length) token ids, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count, length), generator=generator)


class _Observer:
    """Records one run of the module at one shape."""

    def __init__(self, module: nn.Module, batch: int, length: int, vocab_size: int) -> None:
        self.length = length
        self.layers: list[CacheLayer] = []
        self.rows: list[RowsGeometry] = []
        self.states: list[StateGeometry] = []
        self.masked = False  # whether a call passed an attn_mask
        self._batch = batch
        ids = random_ids(batch, length, vocab_size)
        with evaluating(module), intercept(self._record, None, self._keep, self._remember):
            _guarded(module, ids, torch.arange(length).expand_as(ids))

    def _keep(self, call: RowsCall) -> Tensor:
        self.rows.append(RowsGeometry(call.keep, call.rows.shape[2]))
        return call.rows

    def _remember(self, call: StateCall) -> Tensor:
        self.states.append(call.geometry)
        return call.over(None)[0]

    def _record(self, call: AttentionCall) -> Tensor:
        told = f"attention call {len(self.layers)} ({call.where})"
        self._check_shapes(call, told)
        self._check_causal(call, told)
        if call.dropout > 0:
            raise UnkeptError(f"{told} drops out attention weights")
        geometry = KVGeometry(call.key.shape[1], call.key.shape[3], call.value.shape[3])
        self.masked |= call.mask is not None
        self.layers.append(
            CacheLayer(
                geometry,
                heads=call.query.shape[1],
                where=call.where,
                window=call.window,
                special=call.special,
                padding=call.weights is None,
                attributes=tuple(call.fused_attributes),
            )
        )
        return torch_attention(call)

    def _check_shapes(self, call: AttentionCall, told: str) -> None:
        shapes = [tuple(tensor.shape) for tensor in (call.query, call.key, call.value)]
        if any(len(shape) != 4 or shape[0] != self._batch or shape[2] != self.length for shape in shapes):
            raise UnkeptError(f"{told} received query, key and value of shapes {', '.join(map(str, shapes))}")
        if call.query.shape[1] % call.key.shape[1]:
            raise UnkeptError(f"{told} has {call.query.shape[1]} query heads for {call.key.shape[1]} key/value heads")
        if call.query.dtype != torch.float32:
            raise UnkeptError(f"{told} computes in {call.query.dtype}")

    def _check_causal(self, call: AttentionCall, told: str) -> None:
        if call.is_causal:
            return
        mask, causal = call.mask, visible(self.length, self.length)
        if mask is None or mask.shape[-2:] != causal.shape:
            raise UnkeptError(f"{told} is not causal")
        seen = mask if mask.dtype == torch.bool else mask > _MASKED
        if not bool((seen == causal).all()) or (mask.dtype != torch.bool and bool((mask[seen] != 0).any())):
            raise UnkeptError(f"{told} passes an attn_mask that is not the causal one")


# --- the contract -------------------------------------------------------------------------------------------------
def require_finite(module: nn.Module) -> None:
    """Raises NumericsError for a weight that holds NaN or infinity."""
    for path, parameter in module.named_parameters():
        if not parameter.is_floating_point() or bool(parameter.detach().sum().isfinite()):  # which needs no memory
            continue
        if not bool(torch.isfinite(parameter).all()):  # finite weights may have a sum that is not
            raise NumericsError(
                f"the weight {path_in(module, path)} of {name_of(module)} holds NaN or infinity: training went wrong"
            )


def _probe_vocabulary(module: nn.Module, length: int, context_length: int) -> int:
    """V, the width of the logits. Raises ContractError if input_ids index an embedding with fewer rows.

    The first row, which some modules read for all, is at the end of the context, where a table of positions may be
    too short.
    """
    ids = torch.zeros(2, length, dtype=torch.long)
    positions = torch.tensor([[context_length - length], [0]]) + torch.arange(length)
    with evaluating(module), embedding(ids) as rows:
        logits = _guarded(module, ids, positions)
    vocab_size = logits.shape[-1]
    if rows and min(rows) < vocab_size:
        raise ContractError(
            f"{name_of(module)} returns logits of {vocab_size} tokens and embeds {min(rows)}: a generated id of "
            f"{min(rows)} or more could not be read back; give both the same vocabulary, e.g. return "
            f"logits[..., :{min(rows)}]"
        )
    return vocab_size


def _guarded(module: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Calls the module and checks its result."""
    batch, length = input_ids.shape
    try:
        output = module(input_ids, position_ids=position_ids)
    except PastkeyError:
        raise
    except Exception as error:
        raise UnkeptError(f"{name_of(module)} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(output, Tensor):
        raise UnkeptError(f"{name_of(module)} returned a {type(output).__name__}")
    if output.dim() != 3 or output.shape[:2] != (batch, length) or output.dtype != torch.float32:
        raise UnkeptError(f"{name_of(module)} returned {output.dtype} of shape {tuple(output.shape)}")
    if not bool(torch.isfinite(output).all()):
        raise UnkeptError(f"{name_of(module)} returned NaN or infinity")
    if is_distribution(output):
        raise UnkeptError(f"{name_of(module)} returned probabilities")
    return output


class StandIn(nn.Module):
    """A module of the contract that wraps a user's `model`."""

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def native(self) -> contextlib.AbstractContextManager[None]:
        """While open, `model` computes as its author wrote it: the reference."""
        raise NotImplementedError


def natively(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While open, a module computes as its author wrote it."""
    return module.native() if isinstance(module, StandIn) else contextlib.nullcontext()


def name_of(module: nn.Module) -> str:
    """The name of a module in messages: its class, or the class of the wrapped model."""
    return name_of(module.model) if isinstance(module, StandIn) else type(module).__name__


def path_in(module: nn.Module, path: str) -> str:
    """The path of a submodule or weight as its author knows it: inside the wrapped model."""
    return path_in(module.model, path.removeprefix("model.")) if isinstance(module, StandIn) else path
