"""Finds the quantized matrices of a folder, in the form that its configuration names, or of one file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pastkey.errors import InputError

from ..stored_tensors import Joined
from .file import FLOATS, QuantizedFile
from .gptq_awq import awq, gptq
from .matrix import PackedMatrix

Reader = Callable[[QuantizedFile], Iterable[tuple[str, PackedMatrix]]]


def reader_of(settings: Mapping[str, Any], source: object) -> Reader:
    """Returns what reads the form that a quantization_config names. Raises InputError if nothing does."""
    method, bits = settings.get("quant_method"), settings.get("bits", 4)
    if method == "gptq" and bits in (4, 8) and not settings.get("is_marlin_format"):
        version = settings.get("checkpoint_format", settings.get("format")) or "gptq"
        if version in ("gptq", "gptq_v2"):
            return functools.partial(gptq, stored_less_one=version == "gptq")
    if method == "awq" and bits == 4 and str(settings.get("version", settings.get("format"))).lower() == "gemm":
        return awq
    names = ("quant_method", "bits", "checkpoint_format", "version", "format")
    told = ", ".join(f"{name} {settings[name]!r:.60}" for name in names if settings.get(name) is not None)
    raise InputError(
        f"the weights of {source} are quantized already, in a form that pastkey does not read "
        f"({told or 'no quant_method'}; it reads {_READ}): export the unquantized model, pastkey quantizes it itself"
    )


_READ = "GPTQ and AWQ (version gemm)"


def find_packed(files: Sequence[Path], reader: Reader) -> dict[str, Joined]:
    """Returns what is joined in each file, by the file's name. Reads headers, scales and groups.

    Raises InputError for a matrix that is not complete in its file, or there twice.
    """
    found, seen = dict[str, Joined](), dict[str, Path]()
    for path in sorted(files):
        file = QuantizedFile(path)
        made = dict(reader(file))
        plain = [name for name in file.tensors if name not in file.used]
        for name in (*plain, *made):
            if name in seen:
                raise InputError(f"{name} is in {seen[name]} twice, or in {path} as well, in another form: {_ONE}")
            seen[name] = path
            if name not in made and name.endswith("weight") and file.tensors[name].dtype not in (*FLOATS, "F64"):
                raise file.wrong(name, f"is of {file.tensors[name].dtype}, and nothing there says its scales")
        elements = sum(matrix.shape[0] * matrix.shape[1] for matrix in made.values())
        found[path.name] = Joined(made, file.used, elements - sum(file.tensors[name].elements for name in file.used))
    return found


_ONE = "keep one of the two"


def matrices(joined: Mapping[str, Joined]) -> Iterator[PackedMatrix]:
    """Yields the matrices that were found."""
    for part in joined.values():
        yield from (stored for stored in part.made.values() if isinstance(stored, PackedMatrix))
