"""Reads .npz files that may be damaged or untrusted."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Reads an uncompressed .npz, as `np.savez` writes it. The arrays are no larger than the file.

    `np.load` would first allocate the memory that a header asks for. Raises ValueError or BadZipFile for another file.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("the arrays are larger than the file: they are compressed, or overlap")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename:.60} is compressed")
            if entry.header_offset < 0:  # zipfile raises OSError
                raise ValueError(f"{entry.filename:.60} is not in the file")
            content = io.BytesIO(archive.read(entry))
            if np.lib.format.read_magic(content) != (1, 0):
                raise ValueError(f"{entry.filename:.60} has another version")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
            data = content.read()
            if fortran or dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data):
                raise ValueError(f"{entry.filename:.60} has another number of bytes than its shape says")
            found[entry.filename.removesuffix(".npy")] = np.frombuffer(data, dtype).reshape(shape)
    return found
