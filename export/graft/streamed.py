"""Runs a module whose large weights stay in their file: each operator gets those that it reads, one at a time.

A weight in the module's own type is used where the file is mapped, and another one is read into a buffer.

Every operator passes here, wherever the module uses a weight: in its own submodule or another, whole or as a view.
Operators that only make views are unchanged. The results are those of the module with its weights in memory: the
operators are the same, on tensors of the same layout, but float32 products are oneDNN's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pastkey.files.memory import require_memory_for

from ..graph.stored import Stored, StoredWeights, read, stored_weights

_ONEDNN = torch.backends.mkldnn.is_available()
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@dataclass(eq=False)
class _Buffer:
    """Memory that one weight after the other is read into: new memory costs more than reading."""

    memory: Tensor  # bytes
    stored: Stored | None = None
    dtype: torch.dtype = torch.float32

    def fill(self, stored: Stored, dtype: torch.dtype) -> None:
        elements = torch.Size(stored.shape).numel()
        if self.memory.numel() < elements * dtype.itemsize:
            self.memory = torch.empty(elements * dtype.itemsize, dtype=torch.uint8)
        self.stored, self.dtype = None, dtype
        stored.read_into(self.content(elements).view(stored.shape))
        self.stored = stored

    def content(self, elements: int) -> Tensor:
        return self.memory[: elements * self.dtype.itemsize].view(self.dtype)


class WrittenError(RuntimeError):
    """An operator writes into a weight that stays in its file."""


class Streaming(TorchDispatchMode):
    """While open, operators compute with the stored weights instead of hollow memory.

    Raises WrittenError for an operator that writes into a stored weight.
    """

    def __init__(self, weights: StoredWeights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self._buffers: list[_Buffer] = []  # as many as an operator reads stored weights

    def __exit__(self, *error: Any) -> None:
        self._buffers.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or all(self._weights.of(tensor) is None for tensor in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        used: list[Tensor] = []

        def with_numbers(tensor: Tensor) -> Tensor:
            stored = self._weights.of(tensor)
            if stored is None:
                return tensor
            whole = stored.mapped(tensor.dtype)
            used.append(self._filled(stored, tensor.dtype, used) if whole is None else whole)
            start = used[-1].storage_offset() + tensor.storage_offset()
            return used[-1].as_strided(tensor.shape, tensor.stride(), start)

        args, kwargs = tree_map_only(Tensor, with_numbers, (args, kwargs))
        if func._schema.is_mutable and any(
            argument.alias_info is not None and argument.alias_info.is_write and _is_in(tree_leaves(given), used)
            for argument, given in zip(func._schema.arguments, args, strict=False)
        ):
            raise WrittenError(f"{func} writes into a weight, which stays in its file")
        if func in _PRODUCTS and not kwargs:
            *bias, x, matrix = args
            if (
                matrix.dtype == torch.float32
                and matrix.t().is_contiguous()
                and all(b.shape == matrix.shape[1:] for b in bias)
            ):
                return product(x, matrix.t(), *bias)
        result = func(*args, **kwargs)
        if _is_in(tree_leaves(result), used):  # it must keep its memory
            self._buffers.clear()
        return result

    def _filled(self, stored: Stored, dtype: torch.dtype, used: list[Tensor]) -> Tensor:
        """Returns the stored tensor (N,) in a buffer that this operator does not use yet for another."""
        held = next((b for b in self._buffers if b.stored is stored and b.dtype == dtype), None)
        if held is None:
            held = next((b for b in self._buffers if not _is_in([b.memory], used)), None)
            if held is None:
                held = _Buffer(torch.empty(0, dtype=torch.uint8))
                self._buffers.append(held)
            held.fill(stored, dtype)
        return held.content(torch.Size(stored.shape).numel())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x (N, K) times the transpose of a weight (M, K), in float32: oneDNN needs half of MKL's time on AMD."""
    if not _ONEDNN:
        return nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors that an operator is given, by themselves or in lists."""
    for given in (*args, *kwargs.values()):
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, Tensor):
                yield value


def _is_in(values: Iterable[Any], others: Iterable[Tensor]) -> bool:
    """Whether a tensor of the values shares memory with one of the others."""
    known = {other.untyped_storage().data_ptr() for other in others}
    return any(isinstance(value, Tensor) and value.untyped_storage().data_ptr() in known for value in values)


def streaming(module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """While open, the module computes with its stored weights, if it has some."""
    weights = stored_weights(module)
    return contextlib.nullcontext() if weights is None else Streaming(weights)


def load(module: nn.Module) -> None:
    """Reads all weights into memory, for code that cannot do without. Raises ResourceError if they do not fit."""
    weights = stored_weights(module)
    if weights is not None:
        needed = sum(parameter.nbytes for parameter, _ in weights.parameters(module))
        require_memory_for("all weights", needed)
        for parameter, stored in weights.parameters(module):
            parameter.data = read(stored)
        weights.forget()


def in_float64(module: nn.Module) -> nn.Module:
    """Returns a copy that computes in float64. Stored weights stay in their file; reading widens them."""
    weights = stored_weights(module)
    memo: dict[int, Any] = {}
    if weights is not None:
        for parameter, stored in weights.parameters(module):
            memo[id(parameter)] = nn.Parameter(weights.hollow(stored, torch.float64), requires_grad=False)
    return copy.deepcopy(module, memo).double()


@contextlib.contextmanager
def computing_in_float64() -> Iterator[None]:
    """While open, tensors that a module makes in or casts to float32 are float64, as in norms and rotary positions."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widening(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = {torch.float32: torch.float64}
        args = [wide.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def resident_bytes(module: nn.Module) -> int:
    """Returns the bytes of the parameters and buffers that are in memory."""
    weights = stored_weights(module)
    held = {id(t): t for t in [*module.parameters(), *module.buffers()]}.values()
    return sum(t.nbytes for t in held if weights is None or weights.of(t) is None)
