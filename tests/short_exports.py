"""Short exports in tests: an equal decoder is traced once a run, calibration runs on short windows, on one thread.

torch's trace is nine tenths of the export of a tiny decoder. Its graph depends on the module and on the observation
of it alone, so the second export of an equal module gets a copy of the first graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from pastkey.export import grafting
from pastkey.export.graph.stored import stored_weights
from pastkey.export.quantize.calibrate import calibration
from pastkey.files.durable import write_whole

_CALIBRATION_LENGTH = 64  # tokens of a window, instead of 256
_LARGEST = 4_000_000  # bytes of weights of a decoder whose graph is kept


class _Key(pickle.Pickler):
    """Pickles a module with the bytes of its tensors, and the code of its classes, instead of only their names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[tuple[int, int], int] = {}

    def persistent_id(self, value: Any) -> object:
        if isinstance(value, Tensor):
            shared = (value.untyped_storage().data_ptr(), int(value.storage_offset()))
            place = self.storages.setdefault(shared, len(self.storages))  # tied weights stay one initializer
            content = hashlib.sha256(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            return type(value).__name__, place, str(value.dtype), tuple(value.shape), value.stride(), content.digest()
        if isinstance(value, type) and issubclass(value, nn.Module) and not value.__module__.startswith("torch."):
            functions = [method.__code__ for method in vars(value).values() if hasattr(method, "__code__")]
            return value.__module__, value.__qualname__, [*map(_content, functions)]
        return None


def _content(code: types.CodeType) -> object:
    constants = [_content(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return code.co_code, code.co_names, constants


def _key(*values: object) -> str | None:
    """A hash of these values; None if they hold something that cannot be pickled, as a function inside another."""
    file = io.BytesIO()
    try:
        _Key(file).dump(values)
    except Exception:  # a module may hold anything
        return None
    return hashlib.sha256(file.getvalue()).hexdigest()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Modules this small are slower on several threads, and much slower during other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def short_exports(folder: Path) -> Iterator[None]:
    """While open, exports in this process are short, on one thread. `folder` has the traced graphs of all processes."""
    trace = grafting.trace

    def trace_once(module: nn.Module, *given: Any) -> ir.Model:
        *observed, _ = given  # whom it tells
        small = sum(parameter.nbytes for parameter in module.parameters()) < _LARGEST
        key = _key(module, *observed) if small and stored_weights(module) is None else None
        if key is None:
            return trace(module, *given)
        file = folder / key
        if not file.exists():
            write_whole(file, ir.to_proto(trace(module, *given)).SerializeToString())
        model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(file.read_bytes()))
        return model

    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(grafting, "trace", trace_once)
        patch.setattr(calibration, "LENGTH", _CALIBRATION_LENGTH)
        yield
