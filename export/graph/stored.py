"""Weights that stay in the file of their source. A module and a graph hold stand-ins for them.

In a module, the stand-in is hollow memory: pages that are not read and need no memory. A view of it tells by
its address which stored tensor it replaces, whatever torch and its exporter did with it. In a graph, the stand-in is
a tensor that reads the stored one each time that its content is asked for.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, out: Tensor) -> None:
        """Writes the content into a contiguous float32 or float64 tensor of its shape, exactly.

        Raises IntegrityError if the file has changed.
        """

    def mapped(self, dtype: torch.dtype) -> Tensor | None:
        """Returns the content in the mapped file, if it is there in this type. It must not be written."""

    def elements(self, places: Tensor) -> Tensor:
        """Returns float32 elements (N,) at places (N,) of the flattened tensor."""


@dataclass(frozen=True)
class _Region:
    """Hollow memory. Its first and last number are NaN, so that code which reads it by mistake is noticed.

    No two regions have the same bits there, so that passes which compare contents keep them apart.
    """

    stored: Stored
    memory: Tensor


class StoredWeights:
    """The stored tensors of a module, by the address of the hollow memory that replaces each."""

    def __init__(self) -> None:
        self._regions: dict[int, _Region] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> StoredWeights:
        return self

    def hollow(self, stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns hollow memory of the stored tensor's shape.

        It is shared memory: the system counts pages of it when they are written, and not before.
        """
        memory = mmap.mmap(-1, math.prod(stored.shape) * dtype.itemsize)
        tensor = torch.frombuffer(memory, dtype=dtype).view(stored.shape)
        integers = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
        ends = torch.tensor([torch.nan], dtype=dtype).view(integers) + len(self._regions)  # a NaN of its own
        tensor.view(integers).view(-1)[[0, -1]] = ends
        self._regions[tensor.data_ptr()] = _Region(stored, tensor)
        return tensor

    def of(self, tensor: Tensor) -> Stored | None:
        """Returns the stored tensor of which this is a view, None if its numbers are in memory."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
            return None
        region = self._regions.get(tensor.untyped_storage().data_ptr())
        return None if region is None else region.stored

    def forget(self) -> None:
        """Drops all regions: no tensor is hollow any more."""
        self._regions.clear()

    @property
    def empty(self) -> bool:
        """Whether no tensor is hollow."""
        return not self._regions

    def parameters(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Stored]]:
        """Yields each hollow parameter of the module once."""
        for parameter in module.parameters():
            stored = self.of(parameter)
            if stored is not None:
                yield parameter, stored

    def weight(self, raw: object) -> StoredWeight | None:
        """Returns the stand-in in a graph for a view of hollow memory, None for anything else."""
        if isinstance(raw, Tensor):
            address, strides = raw.data_ptr(), raw.stride()
        elif isinstance(raw, np.ndarray):
            address, strides = raw.ctypes.data, tuple(step // raw.itemsize for step in raw.strides)
        else:
            return None
        for start, region in self._regions.items():
            if start <= address < start + region.memory.nbytes:
                offset = (address - start) // region.memory.element_size()
                return StoredWeight(region.stored, tuple(raw.shape), strides, offset)
        return None


class StoredWeight(ir.LazyTensor):
    """An initializer whose content is a view of a stored tensor, read each time that it is asked for."""

    def __init__(self, stored: Stored, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> None:
        """`strides` and `offset` are in elements."""
        self.stored, self.view = stored, (shape, strides, offset)
        super().__init__(self._read, ir.DataType.FLOAT, ir.Shape(shape))

    def _read(self) -> ir.TensorProtocol:
        return ir.Tensor(torch.as_strided(read(self.stored), *self.view).contiguous().numpy())

    def transposed(self) -> StoredWeight:
        """Returns the transpose of this matrix, which is as little read."""
        shape, strides, offset = self.view
        return StoredWeight(self.stored, shape[::-1], strides[::-1], offset)

    def is_same(self, other: object) -> bool:
        """Whether the other tensor is the same view of the same stored tensor."""
        return isinstance(other, StoredWeight) and (other.stored, other.view) == (self.stored, self.view)

    def sample(self, places: np.ndarray) -> np.ndarray:
        """Returns the elements at places (N,) of the flattened view."""
        shape, strides, offset = self.view
        index = np.unravel_index(places, shape)
        flat = sum((i * step for i, step in zip(index, strides, strict=True)), start=np.full(len(places), offset))
        return np.asarray(self.stored.elements(torch.from_numpy(flat)))


def read(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the content of a stored tensor in new memory."""
    out = torch.empty(stored.shape, dtype=dtype)
    stored.read_into(out)
    return out


def stored_weights(module: nn.Module) -> StoredWeights | None:
    """Returns the weights of the module that stay in their file, None if there are none."""
    found = getattr(module, "stored", None)
    return found if isinstance(found, StoredWeights) and not found.empty else None
