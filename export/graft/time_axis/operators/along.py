"""Operators along axes: softmax, sums, norms, padding, triangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...probe.causes import Cause, Kind, ObstacleError
from ..program.program import Op
from ..values import KEY, NEW, Axis, Value
from .base import Refused, Swapped, over_time
from .parts import Parts

SAME_SHAPE = {"softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "flip",
               "logcumsumexp", "sort", "argsort"}  # fmt: skip
REDUCED = {"sum", "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "norm", "linalg_vector_norm",
           "linalg_norm", "any", "all", "argmax", "argmin", "logsumexp", "prod", "median", "nansum",
           "count_nonzero"}  # fmt: skip
_OVER_KEYS = {"softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "sum", "mean", "amax", "max",
              "logsumexp", "norm", "linalg_vector_norm", "linalg_norm", "topk", "amin", "min"}  # fmt: skip


class Along(Parts):
    """Softmax, sums, norms and other operators along an axis."""

    def _along(self, op: Op, x: Value, dims: Any = None, *args: Any, **kwargs: Any) -> Any:
        x = x.real()
        name = op.name
        if name in ("linalg_vector_norm", "linalg_norm", "norm"):
            power, dims, args = dims, (args[0] if args else kwargs.pop("dim", None)), args[1:]
        if isinstance(dims, bool):
            dims, args = None, (dims, *args)
        dims = kwargs.pop("dim", dims)
        if dims is None and name in ("sort", "argsort"):
            dims = -1
        whole = dims is None or dims == []
        wanted = range(len(x.axes)) if whole else [dims] if isinstance(dims, int) else dims
        axes = sorted({d % max(len(x.axes), 1) for d in wanted})
        for d in axes:
            time = x.axes[d].time
            if time == NEW and x.scores:
                raise Swapped(op, x.scores)
            if time == NEW or (time == KEY and name not in _OVER_KEYS):
                raise over_time(op, name)
        if x.batch_axis in axes:
            if x.batched:
                raise Refused(op, f"computes {name.strip('_')} over the rows of the batch", Kind.ROWS)
            x = x.explicit()
        places = [x.dim(d) for d in axes]
        one = isinstance(dims, int)
        if name in ("linalg_vector_norm", "linalg_norm", "norm"):
            result = op.target(x.tensor, power, places, *args, **kwargs)
        elif one or (name in SAME_SHAPE and name != "flip"):
            result = op.target(x.tensor, places[0], *args, **kwargs)
        else:
            result = op.target(x.tensor, places, *args, **kwargs)
        results = list(result) if isinstance(result, list | tuple) else [result]
        values = []
        for tensor, shape in zip(results, op.shapes, strict=True):
            assert shape is not None
            if len(shape) == len(x.axes):
                out = tuple(Axis(1) if i in axes and name in REDUCED else a for i, a in enumerate(x.axes))
                values.append(x.with_(tensor=tensor, axes=out))
            else:
                out = tuple(a for i, a in enumerate(x.axes) if i not in axes)
                batch = x.batch_axis
                if batch is not None:
                    batch -= sum(1 for i in axes if i < batch)
                values.append(x.with_(tensor=tensor, axes=out, batch_axis=batch))
        return values if isinstance(result, list | tuple) else values[0]

    def _topk(self, op: Op, x: Value, k: int, dim: int = -1, *args: Any) -> list[Value | None]:
        """Over whole columns, only the values; of fewer than k columns the missing ones are -inf."""
        dim %= len(x.axes)
        time = x.axes[dim].time
        if time == NEW or not isinstance(k, int):
            raise over_time(op, "topk")
        if time == KEY and any(user.name == "getitem" and user.args[1] == 1 for user in op.users):
            what = "reads where the largest scores are: compare the scores with the smallest of these instead"
            raise ObstacleError(Cause(Kind.UNKNOWN, what, op.where, op.owner))
        x = x.real()
        tensor = x.tensor
        if time == KEY:
            tensor = _padded(tensor, x.dim(dim), 0, k, -torch.inf)
        values, places = torch.topk(tensor, k, x.dim(dim), *args)
        found = self._with_axis(x, dim, Axis(k), values)
        if time == KEY:
            return [found, None]
        return [found, self._with_axis(x, dim, Axis(k), places)]

    def _normalized(self, op: Op, x: Value, shape: Sequence[int], *args: Any) -> Value:
        x = x.real()
        for i in range(len(x.axes) - len(shape), len(x.axes)):
            if x.axes[i].time is not None:
                raise over_time(op, "normalizes")
        function = F.layer_norm if op.name == "layer_norm" else F.rms_norm
        settings: list[Any] = [a.tensor if isinstance(a, Value) else a for a in args[:3]]
        return x.with_(tensor=function(x.tensor, list(shape), *settings))

    _layer_norm = _rms_norm = _normalized

    def _native_batch_norm_legit_no_training(
        self, op: Op, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, _: float, eps: float
    ) -> list[Value | None]:
        """With the figures of the training: a scale and a shift of each channel."""
        x = x.real()
        if x.axes[1].time is not None or x.batch_axis == 1:
            raise Refused(op, "normalizes each position by its own numbers of the training", Kind.FIXED)
        scale = torch.rsqrt(var.tensor + eps) * (1 if weight is None else weight.tensor)
        shift = (0 if bias is None else bias.tensor) - mean.tensor * scale
        wide = [-1, *[1] * (x.tensor.dim() - x.dim(1) - 1)]
        return [x.with_(tensor=x.tensor * scale.reshape(wide) + shift.reshape(wide)), None, None]

    def _group_norm(
        self, op: Op, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *args: Any
    ) -> Value:
        """Of rows (B·T, C, ...), each by itself."""
        x = x.real()
        if any(axis.time is not None for axis in x.axes[1:]):
            raise over_time(op, "normalizes")
        x = x.explicit() if x.batch_axis != 0 else x
        at = x.dim(1)
        flat = x.tensor.reshape(-1, *x.tensor.shape[at:])
        scale, shift = (None if part is None else part.tensor for part in (weight, bias))
        return x.with_(tensor=F.group_norm(flat, groups, scale, shift, *args[:1]).reshape(x.tensor.shape))

    def _pad(self, op: Op, x: Value, pads: Sequence[Any], *args: Any, **kwargs: Any) -> Value:
        touched = [len(x.axes) - 1 - i // 2 for i, p in enumerate(pads) if p != 0]
        if self.shifts and touched and all(x.axes[d].time == NEW for d in touched):
            place = 2 * (len(x.axes) - 1 - touched[0])
            value = args[-1] if args and isinstance(args[-1], int | float) else 0
            x = x.real()
            return self.shifted(
                op, x, touched[0], _padded(x.tensor, x.dim(touched[0]), pads[place], pads[place + 1], value)
            )
        if any(x.axes[d].time for d in touched):
            raise Refused(op, "shifts the positions")
        if not touched:
            return x
        x = x.real().explicit()
        result = op.target(x.tensor, list(pads), *args, **kwargs)
        return x.with_(
            tensor=result,
            axes=tuple(
                Axis(s.at(0)) if i in touched else a for i, (a, s) in enumerate(zip(x.axes, op.shape, strict=True))
            ),
        )

    _constant_pad_nd = _pad

    def _tril(self, op: Op, x: Value, diagonal: int = 0) -> Value:
        x = x.real()
        if not x.axes[-1].plain_time or not x.axes[-2].plain_time or {x.axes[-1].time, x.axes[-2].time} != {NEW, KEY}:
            raise Refused(op, f"computes {op.name} over positions")
        new, total = self.lengths.new, self.lengths.total
        rows, columns = torch.arange(total - new, total), torch.arange(total)
        first, second = (rows, columns) if x.axes[-2].time == NEW else (columns, rows)
        distance = second[None, :] - first[:, None]
        kept = distance <= diagonal if op.name == "tril" else distance >= diagonal
        return x.with_(tensor=torch.where(kept, x.tensor, torch.zeros((), dtype=x.tensor.dtype)))

    _triu = _tril


def _padded(x: Tensor, dim: int, before: int, after: int, value: float) -> Tensor:
    """Adds rows of `value` before and after; a negative count removes rows."""
    shape = list(x.shape)
    shape[dim] = 1
    row = torch.full(shape, value, dtype=x.dtype)
    parts = [row.expand([-1 if i != dim else n for i in range(x.dim())]) for n in (before, after) if n > 0]
    kept = x.narrow(dim, max(-before, 0), x.shape[dim] - max(-before, 0) - max(-after, 0))
    rows = [*([parts.pop(0)] if before > 0 else []), kept, *parts]
    return torch.cat(rows, dim) if len(rows) > 1 else kept
