"""Finds the quantized matrices of a folder, in the form that its configuration names, or of one file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.errors import InputError
from pastkey.files.folder import read_json
from pastkey.values import is_int

from ...graph.stored import Stored
from ..stored_tensors import Joined
from .compressed_tensors import compressed
from .dequantized import Dequantized, bitsandbytes, float8, mxfp4
from .file import FLOATS, QuantizedFile
from .gptq_awq import awq, gptq
from .matrix import PackedMatrix
from .torchao import torchao

Reader = Callable[[QuantizedFile], Iterable[tuple[str, Stored]]]
_Packed = Callable[[QuantizedFile], Iterable[tuple[str, PackedMatrix]]]
_CODES = ("qweight", "weight_packed", "_weight_qdata")
_GPTQ_VERSIONS = ("none", "gptq", "gptq_v2")
_READ = (
    "GPTQ and compressed-tensors of 4 or 8 bits, AWQ of version gemm, torchao's int4 and int8 weights, bitsandbytes of "
    "4 bits, MXFP4, fp8"
)


def reader_of(settings: Mapping[str, Any], source: object) -> Reader:
    """Returns the reader of the form that a quantization_config names. Raises InputError if there is none."""
    method, bits, sizes = settings.get("quant_method"), settings.get("bits", 4), [settings.get("group_size")]
    version = str(settings.get("checkpoint_format") or settings.get("version") or settings.get("format")).lower()
    if method == "gptq" and bits in (4, 8) and version in _GPTQ_VERSIONS and not settings.get("is_marlin_format"):
        sizes = [] if settings.get("dynamic") else sizes  # which gives layers different sizes
        return functools.partial(_checked, sizes, functools.partial(gptq, stored_less_one=version != "gptq_v2"))
    if method == "awq" and bits == 4 and version == "gemm":
        return functools.partial(_checked, sizes, awq)
    if method == "torchao":
        return functools.partial(_checked, [], torchao)
    if method == "compressed-tensors" and (kinds := _integers(settings)):
        read = functools.partial(compressed, asymmetric=not any(kind.get("symmetric", True) for kind in kinds))
        return functools.partial(_checked, [kind.get("group_size") for kind in kinds], read)
    if method == "mxfp4":
        return mxfp4
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        return bitsandbytes
    if (block := _float8_blocks(settings)) is not None:
        return functools.partial(float8, block=block)
    keys = ("quant_method", "bits", "checkpoint_format", "version", "format", "transform_config")
    told = ", ".join(f"{key} {settings[key]!r:.60}" for key in keys if settings.get(key))
    raise InputError(
        f"the weights of {source} are quantized already, in a form that pastkey does not read "
        f"({told or 'no quant_method'}; it reads {_READ}): export the unquantized model, pastkey quantizes it itself"
    )


def _float8_blocks(settings: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns rows and channels of a scale; () if it is for a matrix or a row, None if weights are not all float8."""
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    known = method in ("fp8", "fbgemm_fp8") or (method, settings.get("quant_algo")) == ("modelopt", "FP8")
    if method == "compressed-tensors" and settings.get("format") in ("float-quantized", "naive-quantized"):
        kinds = _kinds(settings)
        blocks = [kind.get("block_structure") for kind in kinds]
        known = all((kind.get("type"), kind.get("num_bits")) == ("float", 8) for kind in kinds)
        known &= not settings.get("transform_config") and all(each == blocks[0] for each in blocks)
        block = blocks[0] if blocks else None
    if not known or block is None:
        return () if known else None
    pair = isinstance(block, list) and len(block) == 2 and all(is_int(size, 1) for size in block)
    return tuple(block) if pair else None


def _integers(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the settings of each group of weights of compressed-tensors; none, if a group is not of 4 or 8 bits."""
    kinds = _kinds(settings)
    known = settings.get("format") in ("pack-quantized", "int-quantized", "mixed-precision")
    if not known or settings.get("transform_config"):  # the latter rotates activations
        return []
    if len({kind.get("symmetric", True) for kind in kinds}) > 1:
        return []  # which of them has zero points is not said per matrix
    return kinds if all(kind.get("type") == "int" and kind.get("num_bits") in (4, 8) for kind in kinds) else []


def _kinds(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the settings of each group of weights of compressed-tensors; an empty one, if a group has none."""
    groups = settings.get("config_groups")
    found = [part.get("weights") if isinstance(part, dict) else None for part in dict(groups or {}).values()]
    return [kind if isinstance(kind, dict) else {} for kind in found]


def _checked(sizes: Sequence[int | None], read: _Packed, file: QuantizedFile) -> Iterator[tuple[str, PackedMatrix]]:
    """Yields the matrices. Raises InputError for one whose groups are of none of these sizes."""
    for name, matrix in read(file):
        wanted = [size for size in sizes if is_int(size, 1)]
        if wanted and matrix.group_size not in (*wanted, matrix.shape[1]):
            told = f"is of shape {matrix.shape} in groups of {matrix.group_size}, and not of {wanted[0]} as its"
            raise file.wrong(name, f"{told} quantization_config says")
        all_middle = matrix.read_zeros is not None and bool((matrix.read_zeros() == 1 << matrix.bits - 1).all())
        yield name, dataclasses.replace(matrix, read_zeros=None) if all_middle else matrix


def find_packed(files: Sequence[Path], reader: Reader) -> dict[str, Joined]:
    """Returns the joined matrices of each file, by the file's name. Reads headers, scales, zero points and groups."""
    whole = joined(QuantizedFile(sorted(files)), reader)
    if not whole.made:
        return {}
    # The parts of a matrix may be in several files, so that all matrices are those of the first.
    first, *others = sorted(path.name for path in files)
    return {first: whole, **dict.fromkeys(others, Joined({}, whole.parts))}


def joined(file: QuantizedFile, reader: Reader) -> Joined:
    """Returns the reader's result for a file. Raises InputError if it leaves a quantized tensor."""
    made = dict(reader(file))
    for name, tensor in file.tensors.items():
        base, _, ending = name.rpartition(".")
        if made and name in file.twice:
            raise file.wrong(name, "is in several of its files", "leave one of them out")
        if name in file.used:
            continue
        if name in made or (ending in _CODES and f"{base}.weight" in made):
            raise file.wrong(name, "is there with the same matrix in another form", "leave one of the two out")
        if tensor.dtype.startswith("F8_") or (name.endswith("weight") and tensor.dtype not in (*FLOATS, "F64")):
            raise file.wrong(name, f"is {tensor.dtype}, and config.json has no form in which it is read")
    elements = sum(math.prod(matrix.shape) for matrix in made.values())
    return Joined(made, file.used, elements - sum(file.tensors[name].elements for name in file.used))


def matrices(found: Iterable[Joined]) -> tuple[PackedMatrix, ...]:
    """Returns the matrices that were found."""
    return tuple(stored for part in found for stored in part.made.values() if isinstance(stored, PackedMatrix))


def dequantized_forms(found: Iterable[Joined]) -> str:
    """Returns the forms of those that are no blocks of integers, for a sentence."""
    made = (stored for part in found for stored in part.made.values())
    return " and ".join(dict.fromkeys(stored.form for stored in made if isinstance(stored, Dequantized)))


# --- a file of weights without its folder -------------------------------------------------------------------------
def in_file(path: Path) -> Joined:
    """Returns the joined matrices of a file of weights, in the form that a configuration next to it gives.

    torchao's matrices need none. Raises InputError for others without one.
    """
    file = QuantizedFile([path])
    if (settings := _beside(path)) is not None:
        return joined(file, reader_of(settings, path))
    if file.bases("_weight_qdata"):
        return joined(file, functools.partial(_checked, [], torchao))
    float8 = [name for name, tensor in file.tensors.items() if tensor.dtype.startswith("F8_")]
    for name in (*file.bases("qweight", "weight_packed", "absmax"), *float8):
        raise InputError(
            f"{path} has quantized weights, such as those of {name}, and no file next to it describes them: put the "
            "config.json or quantize_config.json that came with them into its folder"
        )
    return Joined({}, frozenset())


def _beside(path: Path) -> Mapping[str, Any] | None:
    """Returns the settings of a quantization that a configuration next to the file has."""
    config, own = path.parent / names.CONFIG, path.parent / "quantize_config.json"
    settings = read_json(config).get("quantization_config") if config.is_file() else None
    if settings is None and own.is_file():
        settings = {"quant_method": "gptq"} | read_json(own)
    return settings if isinstance(settings, dict) else None
