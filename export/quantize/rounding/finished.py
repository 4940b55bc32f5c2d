"""The matrices that GPTQ has rounded, a file of each, from which an export that was killed continues."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from pastkey.errors import InputError
from pastkey.files.durable import write_whole

from ...graph.blocks import Blocks, Numbers
from .int4_blocks import BITS, Rounded


def keep_rounded(folder: Path, name: str, rounded: Rounded) -> None:
    """Writes the matrix of this name, if the disk has room."""
    blocks, content = rounded.blocks, io.BytesIO()
    assert blocks.zeros is not None
    assert blocks.scales.codes is not None
    np.savez(
        content,
        data=blocks.data,
        scale_codes=blocks.scales.codes,
        row_scales=blocks.scales.factors,
        zeros=blocks.zeros,
        sizes=np.array([blocks.columns, blocks.block_size]),
        error=np.array(rounded.error),
    )
    with contextlib.suppress(OSError, InputError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _file(name), content.getvalue())


def read_rounded(folder: Path, name: str) -> Rounded | None:
    """Returns the matrix of this name, None if it is missing or damaged."""
    try:
        file = io.BytesIO((folder / _file(name)).read_bytes())
        with np.load(file, allow_pickle=False) as content:  # each array has a checksum
            arrays = dict(content)
        data, (columns, block_size) = arrays["data"], arrays["sizes"].tolist()
        codes, rows, zeros = (arrays[name] for name in ("scale_codes", "row_scales", "zeros"))
        blocks = Blocks(lambda: data, Numbers(rows, codes), columns, block_size, zeros, BITS)
        return Rounded(blocks, float(arrays["error"]))
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
        return None


def _file(name: str) -> str:
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
