"""Rows of the embedding come from the weights file; archives are read as `np.savez` wrote them, and no others."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import Any

import numpy as np
import pytest

from pastkey.errors import IntegrityError
from pastkey.runtime.engine.embedding import EmbeddingRows
from pastkey.runtime.engine.npz import read_npz

TABLE = np.random.default_rng(0).integers(0, 256, (11, 3, 16), np.uint8)
PLACE = {"file": "weights", "offset": 64, "shape": [11, 3, 16]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inside").mkdir()
    for file in (tmp_path / "above", tmp_path / "inside" / "weights"):
        file.write_bytes(b"x" * 64 + TABLE.tobytes())
    return tmp_path / "inside"


def test_rows_are_the_tables(folder):
    ids = np.array([[10, 0, 3], [3, 3, 9]])
    found = EmbeddingRows(folder, json.dumps(PLACE))[ids]
    assert found.shape == (2, 3, 3, 16)
    np.testing.assert_array_equal(found, TABLE[ids])


@pytest.mark.skipif(not hasattr(os, "pread"), reason="this system has no pread, nor fork")
def test_reading_moves_no_position_that_a_forked_process_shares(folder):
    rows = EmbeddingRows(folder, json.dumps(PLACE))
    os.lseek(rows._file, 5, os.SEEK_SET)
    rows[np.array([[10, 3]])]
    assert os.lseek(rows._file, 0, os.SEEK_CUR) == 5


WRONG: dict[str, Any] = {
    "nothing": {},
    "no dict": ["weights"],
    "no file": PLACE | {"file": "missing"},
    "a folder": PLACE | {"file": "..", "shape": [1, 1, 1]},
    "another folder": PLACE | {"file": "../above"},
    "one byte beyond the end": PLACE | {"offset": 65},
    "before the file": PLACE | {"offset": -1},
    "no rows": PLACE | {"shape": [11, 0, 16]},
    "a size": PLACE | {"shape": 11},
    "no sizes": PLACE | {"shape": []},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_place_that_cannot_be_is_refused(folder, wrong):
    with pytest.raises(IntegrityError, match="does not say where its embedding is"):
        EmbeddingRows(folder, json.dumps(WRONG[wrong]))


def test_a_file_that_was_cut_meanwhile_is_noticed(folder):
    rows = EmbeddingRows(folder, json.dumps(PLACE))
    with (folder / "weights").open("r+b") as file:
        file.truncate(80)
    with pytest.raises(IntegrityError, match="cut short"):
        rows[np.array([[5]])]


# --- archives -------------------------------------------------------------------------------------------------------
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
