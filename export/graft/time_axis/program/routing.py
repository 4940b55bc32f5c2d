"""Replaces row selection by token values, such as the tokens of an expert, by computation of all rows.

`x[mask]` and `out[mask] = f(x[mask])` give the same as f of all rows, written where the mask is true, if f computes
each row by itself. The operator rules check that later. A branch that skips an expert without rows, `if mask.any()`,
is answered as if there were some; then nothing is written. Short sequences, where most experts have no rows, test that
this changes no logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...attention import calling_line
from ...probe.causes import Cause, Kind, ObstacleError

_NONZERO = {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere}
_ALSO = ("return_inverse", "return_counts", "dim")  # options that change the result of unique
# Functions that return indices along an axis, and which argument is the axis.
_PLACES = {
    torch.topk: 2, Tensor.topk: 2, torch.sort: 1, Tensor.sort: 1, torch.max: 1, Tensor.max: 1,
    torch.argmax: 1, Tensor.argmax: 1, torch.argsort: 1, Tensor.argsort: 1,
}  # fmt: skip
# Functions that return an index for an index.
_MOVED = {
    "squeeze", "view", "reshape", "flatten", "to", "long", "int", "contiguous", "clone", "detach", "cpu", "type_as",
}  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """How to treat a selection by a mask. Without rows and table, torch selects as usual."""

    rows: int | None = None  # which axis of the mask holds the rows
    table: Any = None  # the result of nonzero for every sequence


@dataclass(frozen=True)
class _Rows:
    """All rows of a mask."""

    chosen: Tensor  # (rows,), whether the mask selects the row
    axis: int  # of the rows
    slots: tuple[Tensor | None, ...]  # for each axis of the mask, the index of each row in it; None for the row axis


@dataclass(frozen=True)
class _Index:
    """The meaning of an index tensor: one axis of a mask, or all axes as columns."""

    rows: _Rows
    axis: int | None


class _Taken(NamedTuple):
    """All rows of a tensor, instead of the selected ones."""

    view: Tensor
    rows: _Rows
    at: int  # which axis of the view holds the rows
    writable: bool  # False for a copy
    in_order: bool  # whether its axes are those of the tensor, except for some of size 1


class Chosen(TorchFunctionMode):
    """While open, replaces a selection of rows by all rows. Subclasses decide how to treat a mask."""

    def __init__(self) -> None:
        super().__init__()
        self._indices: dict[int, tuple[Tensor, _Index]] = {}
        self._masks: dict[int, tuple[Tensor, _Rows]] = {}
        self._picked: dict[int, tuple[Tensor, int]] = {}  # indices, and the size of their axis

    def decide(self, mask: Tensor, listed: bool) -> Decision:
        """How to treat a mask; `listed` if the module asks for its indices (nonzero)."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = self._taken(func, args, kwargs)
        if taken is not NotImplemented:
            return taken
        result = self.plainly(func, args, kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def plainly(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    # --- choices
    def _taken(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a function that selects rows; NotImplemented for any other function."""
        name = getattr(func, "__name__", "")
        if func in _NONZERO or (func is torch.where and len(args) == 1):
            return self._nonzero(args[0], func is torch.where or kwargs.get("as_tuple", False))
        if name == "unique" and id(args[0]) in self._picked and not any(kwargs.get(other) for other in _ALSO):
            return torch.arange(self._picked[id(args[0])][1])
        if name == "masked_select" and len(args) == 2:
            return self._get(args[0], args[1])
        if name == "index_select":
            return self._select(*args, **kwargs) if args else NotImplemented
        if func is Tensor.__getitem__:
            return self._get(*args)
        if func is Tensor.__setitem__:
            return self._set(*args)
        if name in ("index_put", "index_put_"):
            return self._put(name, *args, **kwargs)
        if name in ("index_add", "index_add_", "index_copy", "index_copy_"):
            return self._along(name, *args, **kwargs)
        if name in ("masked_scatter", "masked_scatter_"):
            return self._scattered(name, *args, **kwargs)
        return NotImplemented

    def _nonzero(self, mask: Tensor, as_tuple: bool) -> Any:
        decision = self.decide(mask, True)
        if decision.table is not None:
            return decision.table.unbind(1) if as_tuple else decision.table
        if decision.rows is None:
            return mask.nonzero(as_tuple=True) if as_tuple else mask.nonzero()
        rows = _rows(mask, decision.rows)
        found = tuple(torch.arange(len(rows.chosen)) if slot is None else slot for slot in rows.slots)
        if as_tuple:
            for axis, index in enumerate(found):
                self._indices[id(index)] = index, _Index(rows, axis)
            return found
        table = torch.stack(found, 1)
        self._indices[id(table)] = table, _Index(rows, 0 if len(found) == 1 else None)
        return table

    def _index(self, tensor: object) -> _Index | None:
        return self._indices[id(tensor)][1] if id(tensor) in self._indices else None

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Records the meaning of a function's result."""
        name = getattr(func, "__name__", "")
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        first: Any = args[0] if args else None
        index = self._index(first)
        if index is not None and name in _MOVED and index.axis is not None:
            self._indices[id(result)] = result, index
        elif index is not None and index.axis is None and name in ("unbind", "t", "T", "transpose"):
            for axis, part in enumerate(result if name == "unbind" else ()):
                self._indices[id(part)] = part, _Index(index.rows, axis)
            if name != "unbind":
                self._indices[id(result)] = result, index
        elif isinstance(result, Tensor) and any(self._index(tensor) for tensor in given):
            raise _obstacle("computes with the numbers of rows that the tokens choose")
        if func in _PLACES:
            at = _PLACES[func]
            dim = kwargs.get("dim", args[at] if len(args) > at else -1)
            places = result[1] if isinstance(result, tuple) else result
            if isinstance(dim, int) and isinstance(places, Tensor):
                self._picked[id(places)] = places, first.shape[dim]
        elif id(first) in self._picked and isinstance(result, Tensor) and (name in _MOVED or "getitem" in name):
            self._picked[id(result)] = result, self._picked[id(first)][1]

    # --- reading and writing
    def _parts(self, x: Tensor, key: Any) -> list[tuple[Any, _Rows | None, int]] | None:
        """The parts of a key: (the part, the rows that it selects, the axis of their mask that it indexes).

        None for a key that selects no rows. A mask gives one part per axis.
        """
        parts: list[tuple[Any, _Rows | None, int]] = []
        for part in key if isinstance(key, tuple) else (key,):
            index = self._index(part)
            if index is not None:
                if index.axis is None:
                    raise _obstacle("indexes by all axes of rows that the tokens choose")
                parts.append((part, index.rows, index.axis))
            elif isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) and part.dim():
                rows = self._of_mask(part)
                parts += [(part, None, 0)] if rows is None else [(part, rows, i) for i in range(part.dim())]
            else:
                parts.append((part, None, 0))
        if all(rows is None for _, rows, _ in parts):
            return None
        if any(part is Ellipsis for part, _, _ in parts):
            at = next(i for i, (part, _, _) in enumerate(parts) if part is Ellipsis)
            taken = sum(part is not None and part is not Ellipsis for part, _, _ in parts)
            parts[at : at + 1] = [(slice(None), None, 0)] * (x.dim() - taken)
        if len({id(rows) for _, rows, _ in parts if rows is not None}) > 1 or any(
            isinstance(part, Tensor | list) for part, rows, _ in parts if rows is None
        ):
            raise _obstacle("indexes by rows that the tokens choose, and by others")
        return parts

    def _of_mask(self, mask: Tensor) -> _Rows | None:
        if id(mask) not in self._masks:
            decision = self.decide(mask, False)
            if decision.rows is None:
                return None
            self._masks[id(mask)] = mask, _rows(mask, decision.rows)
        return self._masks[id(mask)][1]

    def _taken_rows(self, x: Tensor, key: Any) -> _Taken | None:
        """All rows of x; None for a key that selects no rows."""
        parts = self._parts(x, key)
        if parts is None:
            return None
        rows = next(rows for _, rows, _ in parts if rows is not None)
        if self._index(x) is not None:
            raise _obstacle("chooses among rows that the tokens choose")
        viewed = x[tuple(part if rows is None else slice(None) for part, rows, _ in parts)]
        kept = [entry for entry in parts if entry[1] is not None or not isinstance(entry[0], int)]
        places = [i for i, entry in enumerate(kept) if entry[1] is not None]
        axes = [kept[i][2] for i in places]
        if rows.axis not in axes:
            raise _obstacle("indexes by a part of the rows that the tokens choose")
        at = places[0] if places == [*range(places[0], places[0] + len(places))] else 0
        if len(places) == 1:
            return _Taken(viewed, rows, places[0], True, True)
        order = sorted(range(len(places)), key=lambda i: axes[i] != rows.axis)
        viewed = viewed.movedim([places[i] for i in order], [*range(len(places))])
        writable = all(n == 1 for n in viewed.shape[1 : len(places)])
        for i in order[1:]:
            slot = rows.slots[axes[i]]
            assert slot is not None
            if viewed.shape[1] == 1:
                viewed = viewed.select(1, 0)
            else:
                where = slot.reshape(-1, *[1] * (viewed.dim() - 1)).expand(-1, 1, *viewed.shape[2:])
                viewed = viewed.gather(1, where).squeeze(1)
        row = places[order[0]]
        in_order = at == row - sum(place < row for place in places)
        return _Taken(viewed.movedim(0, at), rows, at, writable, in_order)

    def _get(self, x: Tensor, key: Any) -> Any:
        index = self._index(x)
        if index is not None and x.dim() == 2 and isinstance(key, tuple) and key[0] == slice(None):
            column = x[key]  # one axis of nonzero's result
            self._indices[id(column)] = column, _Index(index.rows, key[1] % x.shape[1])
            return column
        found = self._taken_rows(x, key)
        return NotImplemented if found is None else found.view.clone()

    def _select(self, x: Tensor, dim: int, index: Tensor) -> Any:
        return self._get(x, (*[slice(None)] * (dim % x.dim()), index))

    def _set(self, x: Tensor, key: Any, value: Any) -> Any:
        found = self._taken_rows(x, key)
        if found is None:
            return NotImplemented
        if not found.writable:
            raise _obstacle("writes places of rows that the tokens choose")
        view = found.view
        new = torch.where(_standing(found.rows.chosen, view, found.at), value, view)
        if found.in_order and view.numel() == x.numel():  # all of x, except for a batch axis
            x.copy_(new.reshape(x.shape))
        else:
            view.copy_(new)
        return None

    def _put(self, name: str, x: Tensor, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
        key = tuple(slice(None) if i is None else i for i in indices)
        if self._parts(x, key) is None:
            return NotImplemented
        target = x if name.endswith("_") else x.clone()
        self._set(target, key, self._get(target, key) + values if accumulate else values)
        return target

    def _along(self, name: str, x: Tensor, dim: int, index: Any, source: Tensor, alpha: float = 1) -> Any:
        marked = self._index(index)
        if marked is None:
            return NotImplemented
        if marked.axis != marked.rows.axis:
            raise _obstacle("writes rows that the tokens choose")
        chosen = _standing(marked.rows.chosen, x, dim % x.dim())
        if "add" in name:
            new = x + torch.where(chosen, source * alpha if alpha != 1 else source, torch.zeros((), dtype=x.dtype))
        else:
            new = torch.where(chosen, source, x)
        return x.copy_(new) if name.endswith("_") else new

    def _scattered(self, name: str, x: Tensor, mask: Tensor, source: Tensor) -> Any:
        for axis, stride in enumerate(mask.stride()):
            mask = mask.narrow(axis, 0, 1) if stride == 0 and mask.shape[axis] else mask  # an expanded axis
        rows = self._of_mask(mask)
        if rows is None:
            return NotImplemented
        at = rows.axis + x.dim() - mask.dim()
        if source.numel() != x.numel() or any(n != 1 for n in x.shape[:at]):
            raise _obstacle("writes a part of rows that the tokens choose")
        new = torch.where(_standing(rows.chosen, x, at), source.reshape(x.shape), x)
        return x.copy_(new) if name.endswith("_") else new


def _rows(mask: Tensor, axis: int) -> _Rows:
    mask = mask != 0
    wide = [i for i, n in enumerate(mask.shape) if i != axis and n > 1]
    flat = mask.movedim(axis, 0)
    for _ in range(mask.dim() - 1 - len(wide)):
        flat = flat.select(1 + next(i for i, n in enumerate(flat.shape[1:]) if n == 1), 0)
    where = flat.flatten(1).int().argmax(1) if wide else None
    chosen = flat.flatten(1).any(1) if wide else flat
    slots: list[Tensor | None] = []
    for i in range(mask.dim()):
        if i == axis:
            slots.append(None)
        elif where is None or i not in wide:
            slots.append(torch.zeros(mask.shape[axis], dtype=torch.long))
        else:
            stride = math.prod(mask.shape[j] for j in wide if j > i)
            slots.append(where if len(wide) == 1 else where // stride % mask.shape[i])
    return _Rows(chosen, axis, tuple(slots))


def _standing(chosen: Tensor, like: Tensor, axis: int) -> Tensor:
    """Reshapes (rows,) to broadcast along one axis of `like`."""
    return chosen.reshape([-1 if i == axis else 1 for i in range(like.dim())])


def _obstacle(what: str) -> ObstacleError:
    return ObstacleError(Cause(Kind.DATA, what, calling_line()))
