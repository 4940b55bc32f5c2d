"""The recurrences of transformers' models, and the short convolutions before them.

transformers calls each by a function that a kernel of the Hub may replace, and knows it by that kernel's name. While
`handed_over` is open, these functions make a call with a state instead of computing. The code knows the kernels' names
and arguments, and no architecture.

https://huggingface.co/docs/transformers/kernel_doc/overview
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import calling_line, remember, replaced
from .states import ConvolutionCall, RecurrenceCall, StateError

_EPSILON = 1e-6  # of the norm of queries and keys, inside transformers' delta rules
_UNLIMITED = (0.0, float("inf"))  # time steps without limits
# Arguments that change no number: the form of the computation, and values that the module passes on to everything.
_HARMLESS = {
    "chunk_size", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "state_dtype", "use_associative_scan", "use_cache", "use_mambapy",
}  # fmt: skip


Functions = list[tuple[ModuleType, str, Callable[..., Any]]]  # a file of transformers, a name in it, its replacement


def recurrences_of(model: nn.Module) -> Functions:
    """The convolutions and recurrences in the files of the model's classes."""
    files = {sys.modules[type(child).__module__] for child in model.modules()}
    return [
        (file, name, functools.partial(_remembered, kernel, function))
        for file in files
        for name, function in vars(file).items()
        if (kernel := _kernel_of(function)) in _KERNELS
    ]


@contextlib.contextmanager
def handed_over(functions: Functions) -> Iterator[None]:
    """While open, these functions are passed to `remember`."""
    with contextlib.ExitStack() as stack:
        for file, name, instead in functions:
            stack.enter_context(replaced(file, name, instead))
        yield


def _kernel_of(function: Any) -> str:
    """The name of the kernel that may replace a function of transformers; "" for any other object."""
    if not inspect.isfunction(function) or not hasattr(function, "__wrapped__"):
        return ""
    return str(inspect.getclosurevars(function).nonlocals.get("func_name", ""))


def _remembered(kernel: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls `remember` instead of the function. Raises StateError for an argument that is not known."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments.pop("kwargs", {}) | bound.arguments
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    given = {name: value for name, value in given.items() if name not in _HARMLESS}
    output = _KERNELS[kernel](given)
    if given:
        told = ", ".join(sorted(given))
        raise StateError(f"{kernel} at {calling_line()} is given {told}, which the graft cannot carry over")
    return (output, None) if kernel in _WITH_STATE else output


def _convolution(given: dict[str, Any]) -> Tensor:
    activation = given.pop("activation", None)
    silu = activation in ("silu", "swish")
    rows, weight, bias = given.pop("hidden_states"), given.pop("weight"), given.pop("bias", None)
    output = remember(ConvolutionCall(rows, weight, bias, silu))
    if activation is None or silu:
        return output
    from transformers.activations import ACT2FN

    activated: Tensor = ACT2FN[activation](output)
    return activated


def _delta_rule(given: dict[str, Any]) -> Tensor:
    query, key, value, decay, beta = (given.pop(name).float() for name in ("query", "key", "value", "g", "beta"))
    if given.pop("use_qk_l2norm_in_kernel", False):
        query, key = _normed(query), _normed(key)
    return remember(RecurrenceCall(query, key, value, decay, beta, key.shape[-1] ** -0.5))


def _normed(rows: Tensor) -> Tensor:
    """rows / sqrt(sum(rows ** 2) + epsilon), written as RMSNorm, which is one node of a fused graph."""
    size = rows.shape[-1]
    inverse = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + _EPSILON / size)
    return rows * inverse * torch.full((size,), size**-0.5)


def _time_step(given: dict[str, Any], step: Tensor, bias: str, softplus: str) -> Tensor:
    if bias in given:
        step = step + given.pop(bias)
    if given.pop(softplus, False):
        step = F.softplus(step)
    low, high = given.pop("dt_limit", _UNLIMITED)
    return step if (low, high) == _UNLIMITED else step.clamp(low, high)


def _mamba_2(given: dict[str, Any]) -> Tensor:
    value, decay, key, query = (given.pop(name).float() for name in ("hidden_states", "A", "B", "C"))
    step = _time_step(given, given.pop("dt").float(), "dt_bias", "dt_softplus")
    call = RecurrenceCall(query, key, value * step[..., None], decay * step, None, 1.0)
    skip = given.pop("D", None)
    output = remember(call)
    return output if skip is None else output + value * (skip if skip.dim() == 2 else skip[:, None])


def _mamba_1(given: dict[str, Any]) -> Tensor:
    value, step = (given.pop(name).float().transpose(1, 2) for name in ("hidden_states", "dt"))  # (B, T, width)
    key, query = (given.pop(name).float().transpose(1, 2)[:, :, None] for name in ("B", "C"))  # (B, T, 1, N)
    step = _time_step(given, step, "delta_bias", "delta_softplus")
    decay = step[..., None] * given.pop("A").float()  # (B, T, width, N): each channel is a head
    output = remember(RecurrenceCall(query, key, (value * step)[..., None], decay, None, 1.0))[..., 0]
    if "D" in given:
        output = output + value * given.pop("D")
    if "z" in given:
        output = output * F.silu(given.pop("z").transpose(1, 2))
    return output.transpose(1, 2)


_KERNELS: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "causal_conv1d_fn": _convolution,
    "chunk_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
    "mamba_chunk_scan_combined": _mamba_2,
    "selective_scan_fn": _mamba_1,
}
_WITH_STATE = ("chunk_gated_delta_rule", "chunk_kda")  # return a last state as well, None if it was not asked for
