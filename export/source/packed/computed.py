"""A tensor that is computed of those in a file, each time that it is read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # elements, so that they stay in the processor's caches


class Computed:
    """A `Stored` of `graph/stored.py`."""

    shape: tuple[int, ...]

    def part(self, start: int, stop: int) -> Tensor:
        """Returns float32 from an index of the first axis to before another."""
        raise NotImplementedError

    def read_into(self, out: Tensor) -> None:
        step = max(1, _AT_ONCE // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            out[start:stop] = self.part(start, stop)

    def mapped(self, dtype: torch.dtype) -> Tensor | None:  # noqa: ARG002  # of the protocol
        return None

    def elements(self, places: Tensor) -> Tensor:
        width = math.prod(self.shape[1:])
        some, index = torch.unique(places // width, return_inverse=True)
        read = torch.cat([self.part(i, i + 1).reshape(1, -1) for i in some.tolist()])
        return read[index, places % width]
