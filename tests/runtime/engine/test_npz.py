"""Arrays are read as `np.savez` wrote them, and no other archive is read."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import pytest

from pastkey.runtime.engine.npz import read_npz

ARRAYS: dict[str, Any] = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.array("text"), "c": np.zeros(0)}


def header(shape: str, descr: str = "<f4", fortran: bool = False) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive(content: bytes, compression: int = zipfile.ZIP_STORED, entries: int = 1) -> bytes:
    """A zip file of one array; several entries are all the same bytes of the file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as out:
        out.writestr("a.npy", content)
        out.filelist += out.filelist * (entries - 1)
    return packed.getvalue()


def test_arrays_are_read_as_they_were_written(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(tmp_path / "a.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive(header("(1,)") + bytes(4), zipfile.ZIP_DEFLATED), "is compressed"),
        (archive(header("(1000,)") + bytes(4000), zipfile.ZIP_DEFLATED), "larger than the file: they are compressed"),
        (archive(header("(1000,)") + bytes(4000), entries=50), "larger than the file: .* overlap"),
        (archive(header("(1000000000000,)") + bytes(4)), "another number of bytes"),
        (archive(header("(2,)", fortran=True) + bytes(8)), "another number of bytes"),
        (archive(header("(1,)", "|O") + bytes(8)), "another number of bytes"),
        (archive(header("(-1, -4)") + bytes(16)), "can only specify one unknown dimension"),
        (archive(b"\x93NUMPY\x02\x00" + bytes(8)), "has another version"),
        (archive(b"no array"), "magic string"),
        (archive(header("(1,)") + bytes(4))[8:], "is not in the file|Bad magic|Overlapped|not a zip"),
    ],
)
def test_other_archives_are_refused(tmp_path, content, words):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises((ValueError, zipfile.BadZipFile), match=words):
        read_npz(tmp_path / "a.npz")
