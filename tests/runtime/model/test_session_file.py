"""A saved session is read back by the bundle that wrote it, and by no other, whole or not at all."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import load

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


@pytest.fixture
def session(model):
    session = model.session()
    session.append("once upon")
    session.generate(**SETTINGS)
    return session


def test_it_goes_on_as_if_it_had_never_left(model, session, tmp_path):
    session.save(tmp_path / "s")
    again = load(model.bundle.path, threads=1).load_session(tmp_path / "s")
    assert again.ids == session.ids
    expected, found = session.generate(" a", **SETTINGS), again.generate(" a", **SETTINGS)
    assert found.ids == expected.ids
    assert found.cached_tokens == expected.cached_tokens == 20
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_empty_one_is_one_too(model, tmp_path):
    model.session().save(tmp_path / "s")
    assert model.load_session(tmp_path / "s").generate("ab", **SETTINGS).ids == model.generate("ab", **SETTINGS).ids


def test_cut_anywhere_it_is_refused(model, session, tmp_path):
    session.save(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    lengths = [*range(0, len(content), 100), len(content) - 1]
    assert len(lengths) > 50
    for length in lengths:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(IntegrityError, match="cannot be read as a saved session"):
            model.load_session(tmp_path / "cut")


def test_altered_content_is_refused(model, session, tmp_path):
    session.save(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    refused = 0
    for place in range(0, len(content), 11):
        altered = bytearray(content)
        altered[place] ^= 1
        (tmp_path / "altered").write_bytes(altered)
        try:
            assert model.load_session(tmp_path / "altered").ids == session.ids  # a date in the zip file
        except IntegrityError:
            refused += 1
    assert refused > 0.9 * len(content) / 11


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": [99]}, {"ids": "abc"}, {"ids": [1.5]}, {"ids": [True]}, {"ids": [[1]]}, {"ids": [1] * 700},
        {"lengths": [22, 0, 0]}, {"lengths": [-1, 0, 0]}, {"lengths": [20, 0, 21]}, {"lengths": [20, 1, 0]},
        {"lengths": [1, 2]}, {"lengths": [20.0, 0, 0]}, {"arr_0": [1.0]}, {"arr_0": 1}, {"arr_4": [1.0]},
        {"arr_0": np.zeros((1, 2, 20, 8))}, {"bundle": 3},
    ],
)  # fmt: skip
def test_content_that_does_not_go_with_the_bundle_is_refused(model, session, tmp_path, fields):
    session.save(tmp_path / "s")
    with np.load(tmp_path / "s") as saved:
        content: dict[str, Any] = {**saved, **fields}
    with (tmp_path / "made").open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(IntegrityError):
        model.load_session(tmp_path / "made")


def test_another_bundle_is_refused(model, session, tmp_path, tiny, make_bundle):
    session.save(tmp_path / "s")
    other = load(make_bundle(type(tiny).random([(8, 8), (16, 16)], 600, seed=1), "fused").path, threads=1)
    with pytest.raises(IntegrityError, match="was saved by another bundle than"):
        other.load_session(tmp_path / "s")


def test_where_there_is_none(model, session, tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        model.load_session(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder; a file was expected"):
        model.load_session(tmp_path)
    with pytest.raises(FileNotFoundError):
        session.save(tmp_path / "none" / "s")
    with pytest.raises(IsADirectoryError):
        session.save(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "full"])
def test_a_full_disk_leaves_what_stood_there(model, session, tmp_path, monkeypatch, step):
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    session.generate(**SETTINGS)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert len(model.load_session(tmp_path / "s").ids) == 21
    session.save(tmp_path / "s")
    assert len(model.load_session(tmp_path / "s").ids) == 33
