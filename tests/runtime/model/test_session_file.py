"""A saved session is read back by the bundle that wrote it, and by no other, whole or not at all."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import load

from ..conftest import DRAWN


def begun(model: Any) -> Any:
    """A session of a text and what came of it."""
    session = model.session()
    session.generate("once upon", **DRAWN)
    return session


def test_it_goes_on_as_if_it_had_never_left(model, tmp_path):
    session = begun(model)
    session.save(tmp_path / "s")
    again = load(model.bundle.path, threads=1).load_session(tmp_path / "s")
    assert again.ids == session.ids
    expected, found = session.generate(" a", **DRAWN), again.generate(" a", **DRAWN)
    assert found.ids == expected.ids
    assert found.cached_tokens == expected.cached_tokens == 20
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_empty_one_is_one_too(lm, tmp_path):
    lm.session().save(tmp_path / "s")
    assert lm.load_session(tmp_path / "s").generate("ab", **DRAWN).ids == lm.generate("ab", **DRAWN).ids


# --- what is no session of this bundle ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    """The bytes of a file, and the ids in it."""
    session, file = begun(lm), tmp_path_factory.mktemp("saved") / "s"
    session.save(file)
    return file.read_bytes(), session.ids


def test_cut_or_altered_anywhere_it_is_refused(lm, saved, tmp_path):
    (content, ids), refused = saved, 0
    for length in [*range(0, len(content), len(content) // 20), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(IntegrityError, match="cannot be read as a saved session"):
            lm.load_session(tmp_path / "cut")
    for place in range(0, len(content), len(content) // 100):
        altered = bytearray(content)
        altered[place] ^= 1
        (tmp_path / "altered").write_bytes(altered)
        try:
            assert lm.load_session(tmp_path / "altered").ids == ids  # a date in the zip file
        except IntegrityError:
            refused += 1
    assert refused > 90


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": [99]}, {"ids": [-1]}, {"ids": "abc"}, {"ids": [1.5]}, {"ids": [[1]]}, {"ids": [1] * 700},
        {"lengths": [22, 0, 0]}, {"lengths": [-1, 0, 0]}, {"lengths": [20, 0, 21]}, {"lengths": [20, 1, 0]},
        {"lengths": [1, 2]}, {"lengths": [20.0, 0, 0]}, {"arr_0": [1.0]}, {"arr_4": [1.0]},
        {"arr_0": np.zeros((1, 2, 20, 8))}, {"arr_0": np.zeros((1, 2, 5, 8), np.float32)}, {"bundle": 3},
    ],
)  # fmt: skip
def test_content_that_does_not_go_with_the_bundle_is_refused(lm, saved, tmp_path, fields):
    (tmp_path / "s").write_bytes(saved[0])
    with np.load(tmp_path / "s") as found:
        content: dict[str, Any] = {**found, **fields}
    with (tmp_path / "made").open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(IntegrityError):
        lm.load_session(tmp_path / "made")


def test_another_bundle_is_refused(saved, tmp_path, tiny, make_bundle):
    (tmp_path / "s").write_bytes(saved[0])
    other = load(make_bundle(type(tiny).random([(8, 8), (16, 16)], 600, seed=1)).path, threads=1)
    with pytest.raises(IntegrityError, match="was saved by another bundle than"):
        other.load_session(tmp_path / "s")


def test_where_there_is_none(lm, tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        lm.load_session(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder; a file was expected"):
        lm.load_session(tmp_path)
    with pytest.raises(IsADirectoryError):
        lm.session().save(tmp_path)


@pytest.mark.parametrize("place", [(os, "fsync"), (np, "savez")])
def test_a_full_disk_leaves_what_stood_there(lm, saved, tmp_path, monkeypatch, place):
    (tmp_path / "s").write_bytes(saved[0])
    session = lm.load_session(tmp_path / "s")
    session.generate(**DRAWN)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*place, full)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s").read_bytes() == saved[0]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    session.save(tmp_path / "s")
    assert len(lm.load_session(tmp_path / "s").ids) == 33
