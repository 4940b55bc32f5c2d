"""Folders are whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pastkey.errors import ExistingFolderError, InputError, IntegrityError
from pastkey.folder import check_hashes, check_sizes, file_record, parse_records, whole_folder, write_json


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "out") as work:
        (work / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"


def test_nothing_stays_of_one_that_failed(tmp_path: Path) -> None:
    def write_until_the_disk_is_full() -> None:
        with whole_folder(tmp_path / "out") as work:
            (work / "a").write_text("a")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_until_the_disk_is_full()
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_what_pastkey_wrote_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ExistingFolderError, match="did not write it"), whole_folder(out, force=True):
        pass
    write_json(out / "pastkey.json", {})
    with whole_folder(out, force=True) as work:
        (work / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_while_replacing_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "pastkey.json", {})
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(out, force=True):
        pass
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "pastkey.json").is_file()


def test_a_second_interrupt_does_not_stop_the_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, calls = shutil.rmtree, list[Path]()

    def impatient(path: Path, **options: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, **options)

    def write_until_interrupted() -> None:
        with whole_folder(tmp_path / "out") as work:
            (work / "a").write_text("a")
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", impatient)
    with pytest.raises(KeyboardInterrupt):
        write_until_interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="which is a file"), whole_folder(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IntegrityError, match="not a path inside"):
        parse_records(tmp_path, {name: {"size": 1, "sha256": "0"}})


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(IntegrityError, match="leads out of the folder"):
        check_sizes(folder, {"a": file_record(tmp_path / "secret")})


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a"
    file.write_text("right")
    records = {"a": file_record(file)}
    check_hashes(tmp_path, records)
    hashed: list[Path] = []

    def spy(path: Path) -> str:
        hashed.append(path)
        return records["a"].sha256

    monkeypatch.setattr("pastkey.folder.sha256", spy)
    check_hashes(tmp_path, records)
    assert hashed == []
    check_hashes(tmp_path, records, remembered=False)
    assert hashed == [file]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_text("wrong")
    with pytest.raises(IntegrityError, match="a was altered"):
        check_hashes(tmp_path, records)
