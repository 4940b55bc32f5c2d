"""Rows of the embedding come from the weights file."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from pastkey.errors import IntegrityError
from pastkey.runtime.engine import embedding
from pastkey.runtime.engine.embedding import EmbeddingRows

TABLE = np.random.default_rng(0).integers(0, 256, (11, 3, 16), np.uint8)
PLACE = {"file": "weights", "offset": 64, "shape": [11, 3, 16]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inside").mkdir()
    for file in (tmp_path / "above", tmp_path / "inside" / "weights"):
        file.write_bytes(b"x" * 64 + TABLE.tobytes())
    return tmp_path / "inside"


@pytest.mark.parametrize("read", [embedding._read_into, embedding._seek_and_read])
def test_rows_are_the_tables(folder, monkeypatch, read):
    monkeypatch.setattr(embedding, "_read_into", read)
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
