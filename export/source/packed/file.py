"""The tensors of safetensors files that belong to quantized matrices, checked before they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pastkey.errors import InputError
from pastkey.files.reading import reading
from pastkey.files.safetensors_header import StoredTensor, read_header

from ..stored_tensors import MappedFile

FLOATS = ("F16", "BF16", "F32")
_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
_OTHERWISE = "export the unquantized model, or fetch the file again if it may be damaged"


class QuantizedFile:
    """A safetensors file, or all of a folder, mapped for reading: the parts of a matrix may be in different ones."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.path = paths[0] if len(paths) == 1 else paths[0].parent
        self.tensors, self.metadata = dict[str, StoredTensor](), dict[str, str]()
        self.used = set[str]()  # the tensors that were asked for: those of quantized matrices
        self.twice = set[str]()  # those in several files
        self._places = dict[str, tuple[MappedFile, int]]()  # of each tensor: its file, and where its data begin
        for path in paths:
            with reading(path, "safetensors"):
                tensors, mapped = read_header(path), MappedFile(path)
                with safe_open(path, framework="pt") as opened:
                    self.metadata |= opened.metadata() or {}
            start = path.stat().st_size - max((tensor.end for tensor in tensors.values()), default=0)
            self.twice |= self.tensors.keys() & tensors
            self.tensors |= tensors
            self._places |= dict.fromkeys(tensors, (mapped, start))

    def bases(self, *endings: str) -> list[str]:
        """Returns the beginnings of tensor names that have these endings, each once."""
        found = (name.rpartition(".") for name in self.tensors)
        return list(dict.fromkeys(base for base, dot, ending in found if dot and ending in endings))

    def shape(self, name: str, types: Sequence[str], *expected: int | None) -> tuple[int, ...]:
        """Returns a tensor's shape. Raises InputError if it is missing, or of another type or shape; None: any size."""
        self.used.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InputError(f"{self.path} has no {name}, which its quantized matrix needs: {_OTHERWISE}")
        sizes = len(tensor.shape) == len(expected) and all(
            size > 0 if wanted is None else size == wanted for size, wanted in zip(tensor.shape, expected, strict=True)
        )
        if tensor.dtype not in types or not sizes:
            told = ", ".join("any" if wanted is None else str(wanted) for wanted in expected)
            raise self.wrong(name, f"is {tensor.dtype} of shape {tensor.shape}, not {' or '.join(types)} of ({told})")
        return tensor.shape

    def read(self, name: str) -> Tensor:
        """Returns a tensor where the file is mapped. It must not be written."""
        tensor, (mapped, start) = self.tensors[name], self._places[name]
        content = mapped.tensor(_DTYPES[tensor.dtype], tensor.elements, start + tensor.start)
        return content.view(tensor.shape)

    def scales(self, name: str, made: Callable[[Tensor], Tensor] = Tensor.float) -> Callable[[], Tensor]:
        """Returns the reader of scales or offsets (N, G) in float32. Raises InputError if one is not finite."""
        self.require_finite(name)
        return lambda: made(self.read(name).float()).contiguous()

    def require_finite(self, name: str) -> None:
        """Raises InputError if a number is NaN or infinite."""
        if not self.read(name).isfinite().all():
            raise self.wrong(name, "has numbers that are not finite (NaN or infinite)")

    def order(self, name: str, groups: int, size: int) -> np.ndarray | None:
        """Returns the channels (K,) sorted by their groups, None if groups are consecutive.

        Raises InputError unless each of the groups has `size` channels.
        """
        self.shape(name, ("I32", "I64"), groups * size)
        group = self.read(name).numpy().astype(np.int64)
        if group.min() < 0 or group.max() >= groups:
            raise self.wrong(name, f"names the group {group.min() if group.min() < 0 else group.max()} of {groups}")
        counts = np.bincount(group, minlength=groups)
        if (counts != size).any():
            other = int(np.argmax(counts != size))
            raise self.wrong(name, f"puts {counts[other]} channels into group {other}; each of {groups} has {size}")
        order = np.argsort(group, kind="stable")
        return None if (np.diff(group) >= 0).all() else order

    def wrong(self, name: str, what: str, advice: str = _OTHERWISE) -> InputError:
        """Returns the error about a tensor."""
        return InputError(f"{name} of {self.path} {what}: {advice}")


def groups_of(size: int, channels: int) -> str:
    """Returns the words for groups of this many channels."""
    return "a scale per row" if size == channels else f"groups of {size}"
