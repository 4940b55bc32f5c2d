"""Estimates the disk and memory that an export needs, before the work starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from pastkey.errors import ResourceError
from pastkey.files.memory import available_memory
from pastkey.files.memory import shown_bytes as _shown
from pastkey.precisions import PRECISIONS

# Measured peaks in copies of the float32 weights (3.1 to 4.8): the module, its trace and the written arrays. Once a
# module is loaded, the precision's own factor applies.
_COPIES_IN_MEMORY = 5
_BASE_BYTES = 600 << 20  # Python, torch and onnxruntime themselves
_BYTES_BY_MATRIX = 15  # disk bytes per weight if matrices are measured one by one, which writes two further graphs


def parameters(module: nn.Module) -> int:
    """Returns the number of weights in the module, each counted once."""
    return sum({id(p): p.numel() for p in [*module.parameters(), *module.buffers()]}.values())


def require_disk(out: Path, weights: int, precision: str, *, by_matrix: bool = False) -> None:
    """Raises ResourceError if the disk of `out` has too little space for a bundle of so many weights."""
    needed = weights * (_BYTES_BY_MATRIX if by_matrix else PRECISIONS[precision].disk_bytes)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(
            f"exporting {weights:,} weights to {out} takes about {_shown(needed)} of disk and {_shown(free)} are free: "
            "make room, or choose another place with --out"
        )


def require_memory(weights: int, *, loaded_for: str | None = None) -> None:
    """Raises ResourceError if the machine has too little memory to export so many weights.

    `loaded_for`: the precision of the export once the weights are loaded, None before.
    """
    copies = _COPIES_IN_MEMORY if loaded_for is None else PRECISIONS[loaded_for].memory_copies
    needed = copies * 4 * weights + _BASE_BYTES
    free = available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"exporting {weights:,} weights takes about {_shown(needed)} of memory and {_shown(free)} are available: "
            "end other programs, or export on a larger machine"
        )
