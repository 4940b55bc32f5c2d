"""The external data file that holds the weights of the graphs in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey.contract import names

# Smaller weights stay in the graph: onnxruntime needs shapes and axes there for shape inference.
INLINE_BYTES = 1024
_ALIGNMENT = 64  # bytes; a cache line
_PAGE_ALIGNMENT, _PAGE_ALIGNED_FROM = 4096, 1 << 20  # large weights start on a page, for memory mapping
_WEIGHTS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4)
_PACKED = (ir.DataType.UINT4, ir.DataType.INT4)  # two per byte


class WeightsFile:
    """The file at `path`, which the graphs of its folder share. Equal content, such as a tied head, is written once.

    The first write creates the file. The weights of a small model may all be in the graph.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # bytes
        self._offsets: dict[tuple[int, bytes], int] = {}

    @classmethod
    def of(cls, graph: Path) -> WeightsFile:
        """Returns the weights file of the graph at this path."""
        return cls(graph.with_name(names.weights_file(graph.name)))

    def place(self, content: bytes | memoryview) -> tuple[str, int]:
        """Writes the content unless the file has it. Returns the file's name and the content's offset."""
        key = (len(content), hashlib.sha256(content).digest())
        if key not in self._offsets:
            alignment = _PAGE_ALIGNMENT if len(content) >= _PAGE_ALIGNED_FROM else _ALIGNMENT
            with self.path.open("ab" if self.size else "wb") as file:
                file.write(b"\0" * (-self.size % alignment))
                self._offsets[key] = file.tell()
                file.write(content)
                self.size = file.tell()
        return self.path.name, self._offsets[key]

    def take_weights(self, model: ir.Model) -> int:
        """Moves the larger initializers of a graph, which is saved in the same folder, into this file.

        Returns the bytes of the weights that stay in the graph.
        """
        return sum(self.take_weight(value) for value in model.graph.initializers.values())

    def take_weight(self, value: ir.Value) -> int:
        """Moves an initializer here, unless it is small. Returns the bytes of a weight that stays in the graph."""
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes < INLINE_BYTES:
            if isinstance(tensor, ir.ExternalTensor):  # of a source's file, which the bundle does not have
                value.const_value = ir.Tensor(np.array(tensor.numpy()), tensor.dtype, name=tensor.name)
            return int(tensor.nbytes) if tensor.dtype in _WEIGHTS else 0
        name, offset = self.place(_content(tensor))
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


def _content(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """Returns little-endian bytes, without a copy if the array is little-endian."""
    if tensor.dtype in _PACKED:
        return tensor.tobytes()
    array = np.ascontiguousarray(tensor.numpy())
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


def save_with_weights(model: ir.Model, path: Path) -> None:
    """Saves a graph with a weights file of its own, without changing the model."""
    ir.save(model, path, external_data=names.weights_file(path.name), size_threshold_bytes=INLINE_BYTES)


def remove_with_weights(path: Path) -> None:
    """Removes the files that `save_with_weights` wrote, if they exist."""
    for file in (path, path.with_name(names.weights_file(path.name))):
        file.unlink(missing_ok=True)
