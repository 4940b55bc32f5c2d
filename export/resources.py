"""Estimates the disk and memory that an export needs, before the work starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pastkey.errors import InputError, ResourceError
from pastkey.files.memory import available_memory
from pastkey.files.memory import shown_bytes as _shown

from .settings import ExportConfig

MAX_ORT_BYTES = 2**31  # a FlatBuffer's offsets have 32 bits and a sign
_BASE_BYTES = 900 << 20  # Python, torch and onnxruntime themselves
_BYTES_BY_MATRIX = 15  # disk bytes per weight if matrices are measured one by one, which writes two further graphs
_BYTES_WHOLE = 12  # further memory per weight of whole graphs: static ones, ORT's, matrices one by one


@dataclass(frozen=True)
class Needs:
    """The peaks of an export in bytes: of disk, and of memory, in which pages of mapped files do not count."""

    weights: int  # their number
    disk: int
    memory: int

    def __str__(self) -> str:
        return f"{self.weights:,} weights need about {_shown(self.disk)} of disk and {_shown(self.memory)} of memory"


def needs(weights: int, config: ExportConfig, *, resident_bytes: int, temporary_bytes: int = 0) -> Needs:
    """Estimates an export of so many weights.

    `resident_bytes` of them are in memory, as those of a module in hand, and `temporary_bytes` go to a temporary file.
    """
    row = config.row
    disk = _BYTES_BY_MATRIX if config.measures_each_matrix else row.disk_bytes
    if config.format == "ort":  # the weights a second time, in addition to the float32 graph
        disk = max(disk, row.bits // 4 + (0 if row.name == "fp32" else 4))
    memory = row.memory_bytes
    if config.static or config.format == "ort" or config.measures_each_matrix:
        memory += _BYTES_WHOLE
    # Resident matrices are transposed in memory; those of a file when they are written.
    return Needs(weights, disk * weights + temporary_bytes, _BASE_BYTES + 2 * resident_bytes + memory * weights)


def parameters(module: nn.Module) -> int:
    """Returns the number of weights in the module, each counted once."""
    return sum({id(p): p.numel() for p in [*module.parameters(), *module.buffers()]}.values())


def require_room(out: Path, needed: Needs, *, allocated: int = 0) -> None:
    """Raises ResourceError if the disk of `out`, or the memory, is too small.

    `allocated` bytes of the memory are in use already, as by a loaded module.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed.disk > free:
        raise ResourceError(
            f"exporting {needed.weights:,} weights to {out} needs about {_shown(needed.disk)} of disk and "
            f"{_shown(free)} are free: make room, or choose another place with --out"
        )
    memory, available = needed.memory - allocated, available_memory()
    if available is not None and memory > available:
        raise ResourceError(
            f"exporting {needed.weights:,} weights needs about {_shown(memory)} of memory and {_shown(available)} are "
            "available: end other programs, or export on a larger machine"
        )


def require_below(shard_size: int, weight_bytes: int) -> None:
    """Raises InputError if one weight does not fit into a file smaller than `shard_size`."""
    if weight_bytes >= shard_size:
        raise InputError(
            f"a weight has {_shown(weight_bytes)}, and each weights file is to be smaller than "
            f"{_shown(shard_size)}: a weight is never split, give a larger --shard-size"
        )


def require_ort_size(weight_bytes: int, precision: str) -> None:
    """Raises InputError if weights of so many bytes do not fit into a file in the ORT format."""
    if weight_bytes >= MAX_ORT_BYTES:
        raise InputError(
            f"a file in the ORT format holds its weights and ends at 2 GB, and these have {_shown(weight_bytes)} in "
            f"{precision}: leave out --format ort"
        )
