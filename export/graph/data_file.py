"""A data file that several static graphs share: what stands in it is written once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from .save import INLINE_BYTES

_ALIGNMENT = 64  # bytes; a cache line


class DataFile:
    """The file at `path`, made when something is written. Of equal content there is one copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[tuple[int, bytes], int] = {}

    def place(self, content: bytes) -> int:
        """The offset at which the content stands: it is written where it does not stand there yet."""
        key = (len(content), hashlib.sha256(content).digest())
        if key not in self._offsets:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                self._offsets[key] = file.tell()
                file.write(content)
        return self._offsets[key]

    def take_weights(self, model: ir.Model) -> None:
        """Moves the larger initializers of a graph here that will stand in the same folder."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_BYTES:
                continue
            content = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self.place(content),
                len(content),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=self.path.parent,
            )
