"""One store of an export's finished steps, from which the next export of the same source continues.

An entry has its key (`keys.py`). Small ones are in the user's cache folder: the float32 graph with its proof,
and the text that the model wrote. Weights that stay in the source's files are not in them: the graph names the
parameter of each. The matrices that GPTQ rounded are in a hidden folder next to OUT until the bundle there is whole, so
that they outlive a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from pastkey.errors import InputError
from pastkey.files.durable import locked, write_whole
from pastkey.files.folder import user_cache_file

from .graph.stored import Stored, StoredWeight, stored_weights
from .keys import Keys
from .progress import Progress

MOST_BYTES = 200_000_000  # of all entries
_MOST_IN_MEMORY = 50_000_000  # bytes of weights in memory, as small matrices are; merged experts need more
_DIGEST_BYTES = hashlib.sha256().digest_size
_GRAPH, _TEXT = "the float32 graph with its proof", "the calibration text"


class Store:
    """The entries of one export. A damaged one counts as missing, and one that cannot be written is not kept.

    Attributes:
        matrices: The folder of the matrices that GPTQ rounded; None if they are not kept.
    """

    def __init__(self, out: Path, keys: Keys, progress: Progress) -> None:
        """An entry without a key is not kept."""
        self._progress, self._keys = progress, keys
        self._folder = user_cache_file("exports")
        self._beside = out.with_name(f".{out.name}.steps")
        self.matrices = None if keys.matrices is None else self._beside / keys.matrices

    # --- small entries ------------------------------------------------------------------------------------------
    def graph(self, module: nn.Module) -> tuple[ir.Model, dict[str, Any]] | None:
        """Returns the float32 graph over the stored weights of this module, and its record."""
        entry = self._read(self._keys.graph)
        if entry is None:
            return None
        record, _, graph = entry.partition(b"\0")
        model = _bound(graph, module)
        if model is None:
            return None
        self._say_taken(_GRAPH)
        return model, json.loads(record)

    def keep_graph(self, graph: bytes | None, record: dict[str, Any]) -> None:
        """Keeps the result of `unbound`."""
        if graph is not None:
            self._write(_GRAPH, self._keys.graph, json.dumps(record).encode() + b"\0" + graph)

    def text(self) -> Any:
        """Returns the record of the calibration text, or None."""
        entry = self._read(self._keys.text)
        if entry is None:
            return None
        self._say_taken(_TEXT)
        return json.loads(entry)

    def keep_text(self, record: dict[str, Any]) -> None:
        """Keeps the record of a calibration text."""
        self._write(_TEXT, self._keys.text, json.dumps(record).encode())

    def _read(self, key: str | None) -> bytes | None:
        """Returns an entry, which is then the most recently used one."""
        if self._folder is None or key is None:
            return None
        try:
            content = (self._folder / key).read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a folder that cannot be written
            os.utime(self._folder / key)
        digest, entry = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return entry if hashlib.sha256(entry).digest() == digest else None

    def _write(self, what: str, key: str | None, entry: bytes) -> None:
        """Writes an entry. Removes the least recently used ones, and files of killed exports, beyond MOST_BYTES."""
        size = _DIGEST_BYTES + len(entry)
        if self._folder is None or key is None or size > MOST_BYTES:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / key, hashlib.sha256(entry).digest() + entry)
            states = {file: file.stat() for file in self._folder.iterdir()}
            held = 0
            for file in sorted(states, key=lambda file: states[file].st_mtime_ns, reverse=True):
                held += states[file].st_size
                if held > MOST_BYTES:
                    file.unlink(missing_ok=True)
        except (OSError, InputError):  # no room or no right to write, or another export removed a file meanwhile
            return
        shown = f"{-(-size // 1000):,} KB in {self._folder}"
        self._progress.say(f"kept {what} for the next export of this source: {shown}; --no-cache keeps nothing")

    def _say_taken(self, what: str) -> None:
        self._progress.say(f"read {what} of an earlier export from {self._folder}; --no-cache makes it again")

    # --- matrices -----------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Locks the matrices, and removes those that this export cannot use; all when the bundle is whole.

        After a failure, says where they are. Raises InUseError if another process exports to the same folder.
        """
        with contextlib.suppress(OSError):  # which the bundle's own folder meets as well
            self._beside.mkdir(parents=True, exist_ok=True)
        with locked(self._beside):
            for entry in self._beside.glob("*") if self.matrices is not None else ():
                if entry != self.matrices:
                    shutil.rmtree(entry, ignore_errors=True)
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):  # it is not empty
                    self._beside.rmdir()
                if self._beside.is_dir():
                    self._progress.say(f"kept finished steps in {self._beside}: the same command continues from there")
                raise
            shutil.rmtree(self._beside, ignore_errors=True)


def unbound(model: ir.Model, module: nn.Module) -> bytes | None:
    """Returns the graph without the module's stored weights. None if it has none, or the others are too large.

    A stored weight is an external tensor whose location is JSON: the parameter, and the view of it as in StoredWeight.
    """
    names = {id(stored): name for name, stored in _stored(module).items()}
    tensors = {value: value.const_value for value in model.graph.initializers.values()}
    stored = {value: tensor for value, tensor in tensors.items() if isinstance(tensor, StoredWeight)}
    others = sum(tensor.nbytes for value, tensor in tensors.items() if tensor is not None and value not in stored)
    if not stored or others > _MOST_IN_MEMORY or any(id(tensor.stored) not in names for tensor in stored.values()):
        return None
    try:
        for value, tensor in stored.items():
            place = json.dumps([names[id(tensor.stored)], *tensor.view])
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(place, None, None, tensor.dtype, shape=shape, name=str(value.name))
        graph: bytes = ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor
    return graph


def _bound(graph: bytes, module: nn.Module) -> ir.Model | None:
    """Returns the graph over the module's stored weights. None if one of them is not stored."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(graph))
    stored = _stored(module)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            parameter, shape, strides, offset = json.loads(str(value.const_value.location))
            if parameter not in stored:  # such as a dequantized one that the disk had no room for
                return None
            value.const_value = StoredWeight(stored[parameter], tuple(shape), tuple(strides), offset)
            value.const_value.name = value.name
    return model


def _stored(module: nn.Module) -> dict[str, Stored]:
    """Returns the stored tensors of the module by the names of its parameters."""
    weights = stored_weights(module)
    if weights is None:
        return {}
    return {name: stored for name, tensor in module.named_parameters() if (stored := weights.of(tensor)) is not None}
