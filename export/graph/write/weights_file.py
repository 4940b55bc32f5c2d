"""The external data files that hold the weights of the graphs in a folder: one, or with a shard size several."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.errors import InputError
from pastkey.files.memory import shown_bytes

from ...resources import require_below

# Smaller weights stay in the graph: onnxruntime needs shapes and axes there for shape inference.
INLINE_BYTES = 1024
_ALIGNMENT = 64  # bytes; a cache line
_PAGE_ALIGNMENT, _PAGE_ALIGNED_FROM = 4096, 1 << 20  # large weights start on a page, for memory mapping
_WEIGHTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4)
_PACKED = (ir.DataType.UINT4, ir.DataType.INT4)  # two per byte


class WeightsFile:
    """The file at `path`, which the graphs of its folder share. Equal content, such as a tied head, is written once.

    The first write creates the file. The weights of a small model may all be in the graph. With `shard_size`, further
    files follow, each smaller than so many bytes. A tensor is never split.
    """

    def __init__(self, path: Path, shard_size: int | None = None) -> None:
        self.path, self._shard_size = path, shard_size
        self._full = 0  # bytes of the earlier shards
        self._shard, self._end = 0, 0  # the shard that is being filled, and its bytes
        self._places: dict[tuple[int, bytes], tuple[str, int]] = {}

    @classmethod
    def of(cls, graph: Path, shard_size: int | None = None) -> WeightsFile:
        """Returns the weights file of the graph at this path."""
        return cls(graph.with_name(names.weights_file(graph.name)), shard_size)

    @property
    def size(self) -> int:
        """The bytes of all shards."""
        return self._full + self._end

    def place(self, content: bytes | memoryview) -> tuple[str, int]:
        """Writes the content unless a file has it. Returns that file's name and the content's offset.

        Raises InputError for content that no shard has room for.
        """
        key = (len(content), hashlib.sha256(content).digest())
        if key not in self._places:
            start = self._start(len(content))
            path = self.path.with_name(names.shard_of(self.path.name, self._shard))
            with path.open("ab" if self._end else "wb") as file:
                file.write(b"\0" * (start - self._end))
                file.write(content)
                self._end = file.tell()
            self._places[key] = path.name, start
        return self._places[key]

    def _start(self, length: int) -> int:
        """Returns the offset of the next content, in the next shard if this one has no room."""
        alignment = _PAGE_ALIGNMENT if length >= _PAGE_ALIGNED_FROM else _ALIGNMENT
        start = -(-self._end // alignment) * alignment
        if self._shard_size is None or start + length < self._shard_size:
            return start
        require_below(self._shard_size, length)
        if self._shard + 1 == names.MAX_SHARDS:
            raise InputError(
                f"files smaller than {shown_bytes(self._shard_size)} would be more than the {names.MAX_SHARDS} that "
                "transformers.js reads: give a larger --shard-size"
            )
        self._full, self._shard, self._end = self._full + self._end, self._shard + 1, 0
        return 0

    def take_weights(self, model: ir.Model, advance: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Moves the larger initializers of a graph, which is saved in the same folder, into this file.

        Returns the bytes of the weights that stay in the graph.
        """
        inline, initializers = 0, [*model.graph.initializers.values()]
        with ThreadPoolExecutor(1) as pool:  # makes the next weight while one is hashed and written
            coming = [pool.submit(_large, value) for value in initializers[:1]]
            for number, value in enumerate(initializers, 1):
                content = coming.pop().result()
                coming += [pool.submit(_large, following) for following in initializers[number : number + 1]]
                inline += self.take_weight(value, content)
                advance(number, len(initializers))
        return inline

    def take_weight(self, value: ir.Value, content: bytes | memoryview | None = None) -> int:
        """Moves an initializer here, unless it is small. Returns the bytes of a weight that stays in the graph.

        `content`: its bytes, if they are made already.
        """
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < INLINE_BYTES:
            if isinstance(tensor, ir.ExternalTensor):  # of a source's file, which the bundle does not have
                value.const_value = ir.Tensor(np.array(tensor.numpy()), tensor.dtype, name=tensor.name)
            return int(tensor.nbytes) if tensor.dtype in _WEIGHTS else 0
        name, offset = self.place(_content(tensor) if content is None else content)
        value.const_value = ir.ExternalTensor(
            name,
            offset,
            int(tensor.nbytes),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(value.name),
            base_dir=self.path.parent,
        )
        return 0


def _large(value: ir.Value) -> bytes | memoryview | None:
    """Returns the bytes of an initializer, None of a small one."""
    tensor = value.const_value
    return None if tensor is None or tensor.nbytes < INLINE_BYTES else _content(tensor)


def _content(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """Returns little-endian bytes, without a copy if the array is little-endian."""
    if tensor.dtype in _PACKED:
        return tensor.tobytes()
    array = np.ascontiguousarray(tensor.numpy())
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


def save_with_weights(model: ir.Model, path: Path) -> None:
    """Saves a graph with a separate weights file, without changing the model. Raises OSError."""
    before = {value: value.const_value for value in model.graph.initializers.values()}
    try:
        WeightsFile.of(path).take_weights(model)
        ir.save(model, path)
    finally:
        for value, tensor in before.items():
            value.const_value = tensor


def remove_with_weights(path: Path) -> None:
    """Removes the files that `save_with_weights` wrote, if they exist."""
    for file in (path, path.with_name(names.weights_file(path.name))):
        file.unlink(missing_ok=True)
