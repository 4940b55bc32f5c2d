"""Running a module once to learn what its cache must hold, and refusing one whose cache cannot be grafted.

Nothing is read from names in a configuration: the KV geometry is what the attention calls are seen to receive.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pastkey.bundle import KVGeometry
from pastkey.errors import ContractError, NumericsError, PastkeyError, first_line

from .attention import AttentionCall, Handler, attention_over, calling_line, failing_line, intercept, torch_attention

CONTRACT = "forward(input_ids, position_ids) -> logits (B, T, V)"
_SEED = 0


@dataclass(frozen=True)
class Layer:
    """One attention call, in order of execution. A block applied several times is several layers."""

    geometry: KVGeometry
    heads: int  # H
    module: str  # path of the submodule that made the call
    where: str  # file:line of the call
    window: int | None = None  # a token sees so many, where attention is local


@dataclass(frozen=True)
class Observation:
    """What running the module showed."""

    layers: tuple[Layer, ...]
    vocab_size: int  # V, the width of the logits

    @property
    def geometry(self) -> tuple[KVGeometry, ...]:
        return tuple(layer.geometry for layer in self.layers)


@dataclass
class Uncached:
    """The slow obvious run that everything is compared with: logits (B, T, V), and each layer's keys and values."""

    logits: Tensor
    keys: list[Tensor] = field(default_factory=list)  # per layer (B, K, T, D)
    values: list[Tensor] = field(default_factory=list)  # per layer (B, K, T, Dv)


# --- running ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule's own mode is put back afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode


def run_uncached(module: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Uncached:
    """Runs the module as it is on (B, T) ids, keeping what its attention calls received."""
    result = Uncached(torch.empty(0))

    def keep(call: AttentionCall) -> Tensor:
        result.keys.append(call.key)
        result.values.append(call.value)
        return torch_attention(call)

    result.logits = _call(module, input_ids, position_ids, keep)
    return result


def run_cached(module: nn.Module, past: Uncached, input_ids: Tensor) -> Tensor:
    """The module on new ids (B, T) alone, its attention calls given the keys and values of `past` as well."""
    start = past.logits.shape[1]
    length = start + input_ids.shape[1]
    layer = iter(zip(past.keys, past.values, strict=True))

    def attend(call: AttentionCall) -> Tensor:
        key, value = next(layer)
        return attention_over(call, torch.cat([key, call.key], 2), torch.cat([value, call.value], 2))

    positions = torch.arange(start, length).expand_as(input_ids)
    return _call(module, input_ids, positions, attend)


def _call(module: nn.Module, input_ids: Tensor, position_ids: Tensor | None, handler: Handler) -> Tensor:
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    with evaluating(module), intercept(handler):
        logits = module(input_ids, position_ids=position_ids)
    assert isinstance(logits, Tensor)
    return logits.float()


# --- observing ----------------------------------------------------------------------------------------------------
def observe(module: nn.Module, context_length: int) -> Observation:
    """Runs the module at two shapes and checks that it keeps the contract. Raises ContractError where it does not,
    and NumericsError for a weight that holds NaN or infinity.
    """
    _check_module(module)
    longest = min(7, context_length)
    vocab_size = _probe_vocabulary(module, longest)
    _check_last_position(module, longest, context_length)
    runs = [_Observer(module, batch, length, vocab_size) for batch, length in ((2, longest), (3, max(2, longest - 2)))]
    if runs[0].masked:  # a window shows where the text is longer than it
        runs.append(_Observer(module, 1, context_length, vocab_size))
    return Observation(_attention_layers(module, runs), vocab_size)


def _attention_layers(module: nn.Module, runs: list[_Observer]) -> tuple[Layer, ...]:
    """The attention calls, seen to be the same in runs of different lengths."""
    # A softmax over T x T scores is one for every T; over as many experts as there are tokens, for one only.
    by_hand = runs[0].softmaxes
    if by_hand and (runs[1].softmaxes or runs[1].length == 2):
        length = runs[0].length
        raise ContractError(
            f"{by_hand[0]} computes attention by hand, a softmax over ({length}, {length}) scores, which no cache can "
            "be grafted onto: change the three lines  scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1));  "
            'scores = scores.masked_fill(future, float("-inf"));  y = scores.softmax(-1) @ v  to the one  '
            "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)"
        )
    first = runs[0].layers
    if not first:
        raise ContractError(
            f"{name_of(module)} made no call of F.scaled_dot_product_attention, so there is nothing to graft a cache "
            "onto: compute attention as  F.scaled_dot_product_attention(q, k, v, is_causal=True)  (with "
            "nn.MultiheadAttention, pass need_weights=False)"
        )
    for run in runs[1:]:
        if [a.geometry for a in first] != [b.geometry for b in run.layers]:
            raise ContractError(
                f"{name_of(module)} makes different attention calls for different lengths ({len(first)} and "
                f"{len(run.layers)}): the calls and their head sizes must not depend on the input"
            )
    return tuple(first)


def random_ids(count: int, length: int, vocab_size: int, seed: int = _SEED) -> Tensor:
    """(count, length) token ids, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count, length), generator=generator)


class _Observer:
    """One run of the module at one shape, and what was seen of it."""

    def __init__(self, module: nn.Module, batch: int, length: int, vocab_size: int) -> None:
        self.length = length
        self.layers: list[Layer] = []
        self.masked = False  # whether a call passed a mask of its own
        self.softmaxes: list[str] = []  # submodules that compute a softmax over T x T scores themselves
        self._module = module
        self._batch = batch
        self._stack: list[str] = []  # the submodules being run
        ids = random_ids(batch, length, vocab_size)
        with _tracking(module, self._stack), evaluating(module), intercept(self._record, self._watch):
            _guarded(module, ids, torch.arange(length).expand_as(ids))

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scores = args[0] if args else kwargs.get("input")
        if func in (torch.softmax, F.softmax, Tensor.softmax, torch.exp, Tensor.exp) and isinstance(scores, Tensor):
            square = scores.dim() >= 3 and scores.shape[-2:] == (self.length, self.length)
            if square and self.length > 2:
                self.softmaxes.append(f"{self._place()} ({calling_line()})")

    def _place(self) -> str:
        return f"{self._stack[-1] if self._stack else ''} of {name_of(self._module)}".removeprefix(" of ")

    def _record(self, call: AttentionCall) -> Tensor:
        number = len(self.layers)
        told = f"attention call {number} ({call.where}, in {self._place()})"
        self._check_shapes(call, told)
        self._check_causal(call, told)
        if call.dropout > 0:
            raise ContractError(
                f"{told} drops out attention weights with probability {call.dropout:g} outside training: "
                "write dropout_p=self.dropout if self.training else 0.0"
            )
        geometry = KVGeometry(call.key.shape[1], call.key.shape[3], call.value.shape[3])
        module = self._stack[-1] if self._stack else ""
        self.masked |= call.mask is not None
        self.layers.append(Layer(geometry, call.query.shape[1], module, call.where, call.window))
        return torch_attention(call)

    def _check_shapes(self, call: AttentionCall, told: str) -> None:
        shapes = [tuple(tensor.shape) for tensor in (call.query, call.key, call.value)]
        expected = all(len(shape) == 4 and shape[0] == self._batch and shape[2] == self.length for shape in shapes)
        if not expected:
            raise ContractError(
                f"{told} received query, key and value of shapes {', '.join(map(str, shapes))} for a batch of "
                f"{self._batch} and {self.length} tokens: expected (B, heads, T, head size), self-attention over "
                "the new tokens alone"
            )
        if call.query.shape[1] % call.key.shape[1]:
            raise ContractError(
                f"{told} has {call.query.shape[1]} query heads for {call.key.shape[1]} key/value heads: "
                "expected a multiple"
            )
        if call.query.dtype != torch.float32:
            raise ContractError(
                f"{told} computes in {call.query.dtype}: leave out autocast and casts, the graph is made in float32"
            )

    def _check_causal(self, call: AttentionCall, told: str) -> None:
        if call.is_causal:
            return
        if call.mask is None:
            raise ContractError(
                f"{told} is not causal: a decoder's token sees only itself and earlier ones, write "
                "F.scaled_dot_product_attention(q, k, v, is_causal=True)"
            )
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        mask = call.mask
        seen = mask if mask.dtype == torch.bool else mask > -1e4
        plain = mask.dtype == torch.bool or bool((mask[seen] == 0).all())
        try:
            same = plain and bool((seen == causal).all()) and seen.shape[-2:] == causal.shape
        except RuntimeError:
            same = False
        if not same:
            raise ContractError(
                f"{told} passes an attn_mask that is not the causal one (alibi, a window or a padding mask, say), "
                "which the graft cannot carry over: write "
                "F.scaled_dot_product_attention(q, k, v, is_causal=True) without a mask"
            )


@contextlib.contextmanager
def _tracking(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keeps `stack` at the path of the submodules being run, the innermost last."""
    handles = []
    for path, child in module.named_modules():
        if not path:
            continue

        def enter(_module: nn.Module, _args: Any, path: str = path_in(module, path)) -> None:
            stack.append(path)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            stack.pop()

        handles += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()


# --- the contract -------------------------------------------------------------------------------------------------
def _check_module(module: nn.Module) -> None:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return
    names = [p.name for p in parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "position_ids" not in names and not takes_any:
        raise ContractError(
            f"forward({', '.join(names)}) of {name_of(module)} does not take position_ids: with a cache the new tokens "
            f"do not start at position 0, so write  {CONTRACT}  and use position_ids for the position encoding"
        )
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ContractError(
                f"{path_in(module, name)} of {name_of(module)} is on {tensor.device}: call module.cpu() first"
            )
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ContractError(
                f"{path_in(module, name)} of {name_of(module)} is {tensor.dtype}: call module.float() first"
            )
        if (
            tensor.is_floating_point()
            and not bool(torch.isfinite(tensor).all())
            and name in dict(module.named_parameters())
        ):
            raise NumericsError(
                f"the weight {path_in(module, name)} of {name_of(module)} holds NaN or infinity: training went wrong"
            )


def _check_last_position(module: nn.Module, length: int, context_length: int) -> None:
    """Runs the module at the end of the context, where a table of positions may be too short."""
    ids = torch.zeros(1, length, dtype=torch.long)
    try:
        with evaluating(module), intercept(torch_attention):
            _guarded(module, ids, torch.arange(context_length - length, context_length)[None])
    except ContractError as error:
        cause = error.__cause__ or error
        where = failing_line(cause)
        raise ContractError(
            f"{name_of(module)} fails at position {context_length - 1}, the last of a context of {context_length} "
            f"tokens{f', at {where}' if where else ''} with {type(cause).__name__}: {first_line(cause)}; give the "
            "context length that the module was made for, or a smaller one"
        ) from error


def _probe_vocabulary(module: nn.Module, length: int) -> int:
    """V, the width of the logits. Raises ContractError when input_ids index an embedding of fewer rows."""
    ids = torch.zeros(2, length, dtype=torch.long)
    rows: list[int] = []

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func is F.embedding:
            index = args[0] if args else kwargs.get("input")
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if isinstance(index, Tensor) and isinstance(weight, Tensor) and index.data_ptr() == ids.data_ptr():
                rows.append(weight.shape[0])

    with evaluating(module), intercept(torch_attention, watch):
        logits = _guarded(module, ids, torch.arange(length).expand_as(ids))
    vocab_size = logits.shape[-1]
    if rows and min(rows) < vocab_size:
        raise ContractError(
            f"{name_of(module)} returns logits of {vocab_size} tokens and embeds {min(rows)}: a generated id of "
            f"{min(rows)} or more could not be read back; give both the same vocabulary, e.g. return "
            f"logits[..., :{min(rows)}]"
        )
    return vocab_size


def _guarded(module: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Calls the module and checks what it returns."""
    batch, length = input_ids.shape
    try:
        output = module(input_ids, position_ids=position_ids)
    except PastkeyError:
        raise
    except Exception as error:
        raise ContractError(
            f"{name_of(module)} failed on input_ids and position_ids of shape ({batch}, {length})"
            f"{f' at {where}' if (where := failing_line(error)) else ''} with {type(error).__name__}: "
            f"{first_line(error)}; expected  {CONTRACT}"
        ) from error
    if not isinstance(output, Tensor):
        what = (
            f"a {type(output).__name__} of {len(output)}"
            if isinstance(output, tuple | list)
            else f"a {type(output).__name__}"
        )
        raise ContractError(f"{name_of(module)} returned {what}: return the logits alone, one tensor (B, T, V)")
    if output.dim() == 3 and output.shape[:2] == (batch, 1) and length > 1:
        raise ContractError(
            f"{name_of(module)} returned logits of the last position only, {tuple(output.shape)} for {length} tokens: "
            "return the logits of every position, (B, T, V); the exporter makes the shorter graph itself"
        )
    if output.dim() != 3 or output.shape[:2] != (batch, length):
        raise ContractError(
            f"{name_of(module)} returned shape {tuple(output.shape)} for {batch} rows of {length} tokens: "
            f"return logits (B, T, V) = ({batch}, {length}, V)"
        )
    if output.dtype != torch.float32:
        raise ContractError(f"{name_of(module)} returned {output.dtype} logits: return float32, e.g. logits.float()")
    if not bool(torch.isfinite(output).all()):
        raise ContractError(f"{name_of(module)} returned NaN or infinity in its logits: check its weights and masks")
    return output


def name_of(module: nn.Module) -> str:
    """What messages call a module: its class, or that of what it wraps."""
    return str(getattr(module, "shown_name", type(module).__name__))


def path_in(module: nn.Module, path: str) -> str:
    """A submodule's or weight's path as its author knows it: within what the module wraps."""
    return path.removeprefix("model.") if hasattr(module, "shown_name") else path
