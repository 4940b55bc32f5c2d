"""Keeps the large weights of safetensors files in their files while transformers loads a model.

transformers decides, as ever, which tensor becomes which parameter. Only the reader that it opens is exchanged: for a
large tensor it returns hollow memory (`graph/stored.py`). Where transformers computes a parameter of several tensors,
such as merged experts, they are read, and that parameter is in memory.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pastkey.errors import IntegrityError
from pastkey.files.safetensors_header import read_header

from ..graft.attention import replaced
from ..graft.streamed import Streaming
from ..graph.stored import Stored, StoredWeights, read

LARGE = 1 << 20  # bytes in float32: smaller weights are loaded, so that a trace computes with right values
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Mapped:
    """A part of a file that is mapped for reading."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """Returns a view of `count` elements from the byte `offset`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the memory must not be written
            return torch.frombuffer(self._content, dtype=dtype, count=count, offset=offset)


class MappedFile(Mapped):
    """A file that is mapped for reading, and must not change meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        with path.open("rb") as file:
            self._state = _state(os.fstat(file.fileno()))
            super().__init__(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> Tensor:
        """As Mapped's. Raises IntegrityError if the file has changed."""
        if not self._path.exists() or _state(self._path.stat()) != self._state:
            raise IntegrityError(f"{self._path} was changed while it was exported: export it again")
        return super().tensor(dtype, count, offset)


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True, eq=False)
class MappedTensor:
    """A tensor of a mapped file."""

    file: Mapped
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the file's beginning

    def read_into(self, out: Tensor) -> None:
        out.copy_(self._content().view(self.shape))

    def mapped(self, dtype: torch.dtype) -> Tensor | None:
        return self._content() if dtype == self.dtype else None

    def elements(self, places: Tensor) -> Tensor:
        return self._content()[places].float()

    def _content(self) -> Tensor:
        return self.file.tensor(self.dtype, torch.Size(self.shape).numel(), self.offset)


@dataclass(frozen=True)
class Joined:
    """Tensors of a file that belong together: transformers sees what is `made` of them, and none of the `parts`."""

    made: Mapping[str, Stored]
    parts: Set[str]
    more: int = 0  # elements of the tensor that is made, less those of the parts

    def names(self, found: Iterable[str]) -> list[str]:
        """Returns the names that transformers sees of those in a file, or in several."""
        return [*(name for name in found if name not in self.parts), *self.made]


_NOTHING = Joined({}, frozenset())


@contextlib.contextmanager
def kept_in_files(weights: StoredWeights | None, joined: Mapping[str, Joined] | None = None) -> Iterator[None]:
    """While open, transformers leaves large weights in the safetensors files that it opens; None: it loads all.

    `joined`: by the name of the file.
    """
    from transformers import modeling_utils

    library: Any = modeling_utils
    files = joined or {}
    original, original_shards = library.safe_open, library.get_checkpoint_shard_files  # it imports them
    ours = threading.get_ident()

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        if threading.get_ident() != ours:  # another thread loads another model
            return original(file, *args, **options)
        if "backend" in options:  # the mapping would count as the program's own memory
            options["backend"] = "pread"
        return _Reader(original(file, *args, **options), Path(file), weights, files.get(Path(file).name, _NOTHING))

    def shards(*args: Any, **options: Any) -> Any:
        found, index = original_shards(*args, **options)
        if threading.get_ident() == ours:  # transformers 4 reads the names from the index
            for part in files.values():
                index["all_checkpoint_keys"] = part.names(index["all_checkpoint_keys"])
        return found, index

    with contextlib.ExitStack() as held:
        held.enter_context(replaced(modeling_utils, "safe_open", opened))
        held.enter_context(replaced(modeling_utils, "get_checkpoint_shard_files", shards))
        if weights is not None:
            held.enter_context(Streaming(weights))
        yield


class _Reader:
    """safetensors' own reader of a file but for its large weights, and tensors that are joined."""

    def __init__(self, opened: Any, path: Path, weights: StoredWeights | None, joined: Joined) -> None:
        self._opened, self._weights, self._joined = opened, weights, joined
        mapped, tensors = MappedFile(path), read_header(path)
        start = path.stat().st_size - max((tensor.end for tensor in tensors.values()), default=0)
        self._large = {
            name: MappedTensor(mapped, _DTYPES[tensor.dtype], tensor.shape, start + tensor.start)
            for name, tensor in tensors.items()
            if weights is not None and tensor.dtype in _DTYPES and tensor.elements * 4 >= LARGE
        }
        self._empty = {name: tensor.shape for name, tensor in tensors.items() if not tensor.elements}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> _Reader:
        self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def keys(self) -> list[str]:
        return self._joined.names(self._opened.keys())

    def get_tensor(self, name: str) -> Any:
        stored = self._stored(name)
        return self._opened.get_tensor(name) if stored is None else self._content(stored)

    def get_slice(self, name: str) -> Any:
        stored = self._stored(name)
        opened = _Sizes(stored.shape) if name in self._joined.made and stored else self._opened.get_slice(name)
        if name in self._empty:  # safetensors cannot slice it, so that nobody would say its name and shape
            return _Slice(opened, lambda: torch.empty(self._empty[name]))
        return opened if stored is None else _Slice(opened, lambda: self._content(stored))

    def _stored(self, name: str) -> Stored | None:
        return self._joined.made.get(name) or self._large.get(name)

    def _content(self, stored: Stored) -> Tensor:
        large = self._weights is not None and math.prod(stored.shape) * 4 >= LARGE
        return self._weights.hollow(stored) if self._weights is not None and large else read(stored)


@dataclass(frozen=True)
class _Sizes:
    """A slice of a joined tensor."""

    shape: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"


class _Slice:
    """A weight as safetensors' slices are: its sizes, and its content when it is indexed."""

    def __init__(self, opened: Any, content: Callable[[], Tensor]) -> None:
        self._opened, self._content = opened, content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._content()[index]
