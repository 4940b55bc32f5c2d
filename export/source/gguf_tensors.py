"""Keeps the large weights of a GGUF file in a temporary file while transformers dequantizes them.

transformers dequantizes one tensor after the other, changes each to its parameter's layout and collects them all. Here
each large one goes to the file as float32 instead, and hollow memory (`graph/stored.py`) replaces it: dequantizing
is too slow to be repeated in each run.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..graft.attention import replaced
from ..graft.streamed import Streaming
from ..graph.stored import StoredWeights
from . import stored_tensors
from .stored_tensors import Mapped, MappedTensor


def _folder() -> str:
    """Returns the folder of the temporary file: on many systems /tmp is in memory."""
    on_disk = "TMPDIR" not in os.environ and Path("/var/tmp").is_dir()
    return "/var/tmp" if on_disk else tempfile.gettempdir()


def has_room(weights: int) -> bool:
    """Whether the temporary file has room for so many weights."""
    return shutil.disk_usage(_folder()).free > 4 * weights


@contextlib.contextmanager
def dequantized_to_disk(weights: StoredWeights) -> Iterator[None]:
    """While open, transformers puts large weights of the GGUF files that it opens into a temporary file.

    It has no name, so that nothing is left of it whatever ends the program.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    known = getattr(reader, "TENSOR_PROCESSORS", {})
    with replaced(reader, "TENSOR_PROCESSORS", _Processors(known, weights)), Streaming(weights):
        yield


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """While open, a GGUF file's header is parsed once, and gguf's table of names made once.

    transformers parses it for the configuration, the weights and the tokenizer, and asks for the table in each
    submodule: half of the time of opening SmolLM2.
    """
    import gguf

    parsed = functools.cache(gguf.GGUFReader)
    with (
        replaced(gguf, "GGUFReader", lambda file, *mode: parsed(str(file), *mode)),
        replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


class _Processors(dict[str, Any]):
    """transformers' processors of tensors by architecture, of which each sends large tensors to the disk."""

    def __init__(self, known: Mapping[str, Any], weights: StoredWeights) -> None:
        super().__init__(known)
        self._weights, self._file = weights, TemporaryWeights()

    def get(self, key: str, default: Any = None) -> Any:
        kind = super().get(key, default)
        return lambda **options: _Processor(kind(**options), self._weights, self._file)


@dataclass
class _Processor:
    own: Any  # transformers'
    weights: StoredWeights
    file: TemporaryWeights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def process(self, **given: Any) -> Any:
        """Does the work of transformers' processor; a large tensor becomes hollow, and transformers skips it then."""
        made = self.own.process(**given)
        name = given["tensor_key_mapping"].get(made.name)
        if name is None or made.weights.dtype != np.float32 or made.weights.nbytes < stored_tensors.LARGE:
            return made
        with contextlib.suppress(OSError):  # no room: it stays in memory
            stored = self.file.add(made.weights)
            given["parsed_parameters"]["tensors"][name] = self.weights.hollow(stored)
            return made._replace(weights=np.empty(0, np.float32), name="")
        return made


class TemporaryWeights:
    """A temporary file of float32 tensors."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=_folder())  # noqa: SIM115  # until it is collected

    def add(self, array: np.ndarray) -> MappedTensor:
        """Writes an array. Raises OSError if the disk is full."""
        start = -(-self._file.seek(0, os.SEEK_END) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(array).data)
        self._file.flush()
        content = mmap.mmap(self._file.fileno(), array.nbytes, access=mmap.ACCESS_READ, offset=start)
        return MappedTensor(Mapped(content), torch.float32, array.shape, 0)
