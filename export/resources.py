"""What an export will need, estimated and said before the work starts rather than found out in the middle of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from pastkey.errors import ResourceError
from pastkey.memory import available_memory
from pastkey.memory import shown_bytes as _shown

# Measured peaks in copies of the float32 weights (3.1 to 4.8): the module, its trace, the arrays that are written. int4
# holds X^T X of every activation as well (6.4).
_COPIES_IN_MEMORY = 5
_COPIES_AFTER_LOADING = {"fp32": 4, "fp16": 4, "int8": 4, "int4": 6}
_BASE_BYTES = 600 << 20  # Python, torch and onnxruntime themselves
# int8 is made from float32 files, which are tried once more with migrated scales: more than it and them together. For
# int4 each matrix is measured in one graph of float32 and it.
_BYTES_PER_WEIGHT = {"fp32": 4, "fp16": 6, "int8": 8, "int4": 11}
_BYTES_BY_MATRIX = 15  # where each matrix is measured: calibrated float32, and one graph of that and int8, as well


def parameters(module: nn.Module) -> int:
    """How many weights the module has, each counted once."""
    return sum({id(p): p.numel() for p in [*module.parameters(), *module.buffers()]}.values())


def require_disk(out: Path, weights: int, precision: str, *, by_matrix: bool = False) -> None:
    """Raises ResourceError when `out` lies on a disk without room for a bundle of so many weights."""
    needed = weights * (_BYTES_BY_MATRIX if by_matrix else _BYTES_PER_WEIGHT[precision])
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(
            f"exporting {weights:,} weights to {out} takes about {_shown(needed)} of disk and {_shown(free)} are free: "
            "make room, or choose another place with --out"
        )


def require_memory(weights: int, *, loaded_for: str | None = None) -> None:
    """Raises ResourceError when the machine has not the memory to export so many weights.

    `loaded_for`: the precision that they were loaded for, or None while they are not yet.
    """
    copies = _COPIES_IN_MEMORY if loaded_for is None else _COPIES_AFTER_LOADING[loaded_for]
    needed = copies * 4 * weights + _BASE_BYTES
    free = available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"exporting {weights:,} weights takes about {_shown(needed)} of memory and {_shown(free)} are available: "
            "end other programs, or export on a larger machine"
        )
