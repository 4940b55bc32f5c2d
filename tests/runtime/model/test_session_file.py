"""A saved session is read back by the bundle that wrote it, and by no other, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import LanguageModel, Session, load

from ..conftest import Tiny

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


@pytest.fixture
def session(model: LanguageModel) -> Session:
    session = model.session()
    session.append("once upon")
    session.generate(**SETTINGS)
    return session


def test_it_goes_on_as_if_it_had_never_left(model: LanguageModel, session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "s")
    again = load(model.bundle.path, threads=1).load_session(tmp_path / "s")
    assert again.ids == session.ids
    expected, found = session.generate(" a", **SETTINGS), again.generate(" a", **SETTINGS)
    assert found.ids == expected.ids
    assert found.cached_tokens == expected.cached_tokens == 20
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_empty_one_is_one_too(model: LanguageModel, tmp_path: Path) -> None:
    model.session().save(tmp_path / "s")
    assert model.load_session(tmp_path / "s").generate("ab", **SETTINGS).ids == model.generate("ab", **SETTINGS).ids


def test_cut_anywhere_it_is_refused(model: LanguageModel, session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    lengths = [*range(0, len(content), 100), len(content) - 1]
    assert len(lengths) > 50
    for length in lengths:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(IntegrityError, match=r"save it again|was cut or altered"):
            model.load_session(tmp_path / "cut")
    (tmp_path / "longer").write_bytes(content + b"x")
    with pytest.raises(IntegrityError, match=r"bytes, .* were expected"):
        model.load_session(tmp_path / "longer")


def test_altered_anywhere_it_is_refused(model: LanguageModel, session: Session, tmp_path: Path) -> None:
    session.save(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    for place in [*range(0, 600, 7), *range(600, len(content), 501), len(content) - 1]:
        altered = bytearray(content)
        altered[place] ^= 1
        (tmp_path / "altered").write_bytes(altered)
        with pytest.raises(IntegrityError):
            model.load_session(tmp_path / "altered")


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": [99]}, {"ids": "abc"}, {"ids": [1.5]}, {"ids": [True]}, {"ids": [1] * 700}, {"cached": 22},
        {"cached": -1}, {"exact": 21}, {"arrays": []}, {"arrays": None}, {"arrays": [[[1, 2, 20, 8], "|O"]] * 4},
        {"arrays": [[[1, 2, 20, 10**9], "<f4"]] * 4}, {"arrays": [1, 2, 3, 4]}, {"arrays": [[]]}, {"bundle": 3},
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(
    model: LanguageModel, session: Session, tmp_path: Path, fields: dict[str, Any]
) -> None:
    session.save(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    start = content.index(b"{")
    length = int(content[start - 9 : start - 1])
    header = json.loads(content[start : start + length]) | fields
    made = json.dumps(header).encode()
    (tmp_path / "made").write_bytes(content[: start - 9] + b"%08d\n" % len(made) + made + content[start + length :])
    with pytest.raises(IntegrityError):
        model.load_session(tmp_path / "made")


def test_another_bundle_is_refused(
    model: LanguageModel, session: Session, tmp_path: Path, tiny: Tiny, make_bundle: Callable[..., Bundle]
) -> None:
    session.save(tmp_path / "s")
    other = load(make_bundle(type(tiny).random([(8, 8), (16, 16)], 600, seed=1), "fused").path, threads=1)
    with pytest.raises(IntegrityError, match="was saved by another bundle than"):
        other.load_session(tmp_path / "s")


def test_where_there_is_none(model: LanguageModel, session: Session, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        model.load_session(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder; a saved session is a file"):
        model.load_session(tmp_path)
    with pytest.raises(InputError, match="is no folder: make it"):
        session.save(tmp_path / "none" / "s")
    with pytest.raises(InputError, match="is a folder; the path of a file was expected"):
        session.save(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "full"])
def test_a_full_disk_leaves_what_stood_there(
    model: LanguageModel, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    session.generate(**SETTINGS)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr("pastkey.runtime.model.session_file._bytes", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert len(model.load_session(tmp_path / "s").ids) == 21
    session.save(tmp_path / "s")
    assert len(model.load_session(tmp_path / "s").ids) == 33
