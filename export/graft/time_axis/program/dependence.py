"""Tracks which tensors of a run depend on the tokens, from the operands of each operator to its result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...attention import calling_line
from ...probe.causes import Cause, Kind, ObstacleError

_OF_THE_SHAPE = ("_like", "new_zeros", "new_ones", "new_full", "new_empty")  # depend on the shape only


class Dependence(TorchDispatchMode):
    """While open, tracks the tensors that depend on `ids`. A view depends on them if its memory does.

    Raises ObstacleError for a function of torch's that has other functions as arguments.
    """

    supports_higher_order_operators = True

    def __init__(self, ids: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = {_memory(ids): ids}  # keeps the tensors alive, so that their memory is not reused

    def __contains__(self, tensors: object) -> bool:
        return any(isinstance(t, Tensor) and _memory(t) in self._made for t in tree_leaves(tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):
            name = str(func)
            instead = "F.scaled_dot_product_attention with its mask" if "flex_attention" in name else "its operators"
            what = f"calls {name}, which cannot be followed: write {instead}"
            raise ObstacleError(Cause(Kind.UNKNOWN, what, calling_line()))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (args, kwargs) in self and not any(part in name for part in _OF_THE_SHAPE):
            written = args[:1] if name.endswith("_") else []
            for tensor in tree_leaves([result, written]):
                if isinstance(tensor, Tensor):
                    self._made[_memory(tensor)] = tensor
        return result


def _memory(tensor: Tensor) -> int:
    while is_batchedtensor(tensor):  # a tensor of torch.vmap has no own memory
        tensor = get_unwrapped(tensor)
    with torch._C._DisableTorchDispatch():
        return tensor.untyped_storage().data_ptr()
