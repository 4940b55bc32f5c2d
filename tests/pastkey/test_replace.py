"""A folder takes the place of another in one step, or the old one is back, or a sentence says where it is."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from pastkey import replace
from pastkey.errors import ResourceError
from pastkey.folder import whole_folder, write_json
from pastkey.lock import held
from pastkey.replace import exchange, leftovers, put_in_place, sync_folder, sync_tree


def folder(path: Path) -> Path:
    """A folder whose one file says how it was called first."""
    path.mkdir()
    (path / "name").write_text(path.name)
    return path


def content(path: Path) -> str:
    return (path / "name").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux' own")
def test_two_names_are_exchanged(tmp_path: Path) -> None:
    assert exchange(folder(tmp_path / "one"), folder(tmp_path / "other"))
    assert (content(tmp_path / "one"), content(tmp_path / "other")) == ("other", "one")
    with pytest.raises(FileNotFoundError, match="none"):
        exchange(tmp_path / "one", tmp_path / "none")


@pytest.mark.parametrize("exchanged", [True, False])
def test_what_stood_there_is_where_it_is_said(exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanged:
        monkeypatch.setattr(replace, "exchange", lambda one, other: False)
    new, out = folder(tmp_path / "new"), folder(tmp_path / "out")
    rest = put_in_place(new, out)
    assert content(out) == "new"
    assert content(rest if rest == new else rest / "out") == "out"
    assert put_in_place(folder(tmp_path / "alone"), tmp_path / "fresh") == tmp_path / "alone"
    assert content(tmp_path / "fresh") == "alone"


@pytest.mark.parametrize("broken", [1, 2])
def test_a_disk_that_fails_at_a_rename_leaves_the_old_one_at_its_name(
    broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {broken})
    new, out = folder(tmp_path / "new"), folder(tmp_path / "out")
    with pytest.raises(OSError, match="broken"):
        put_in_place(new, out)
    assert (content(out), content(new)) == ("out", "new")
    assert sorted(tmp_path.iterdir()) == [new, out]


def test_a_disk_that_fails_from_then_on_is_a_sentence_that_says_where_the_old_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {2, 3})
    new, out = folder(tmp_path / "new"), folder(tmp_path / "out")
    with pytest.raises(ResourceError, match=r"could not be replaced .* it lies whole in (.*); rename it to") as found:
        put_in_place(new, out)
    where = Path(str(found.value).partition("it lies whole in ")[2].partition(";")[0])
    assert content(where) == "out"
    (sentence,) = leftovers(out)
    assert sentence.startswith(f"{where} is what stood at {out} when")


@pytest.mark.parametrize("interrupts", [{2}, {2, 3}])
def test_an_impatient_user_loses_nothing(interrupts: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, interrupts, KeyboardInterrupt())
    new, out = folder(tmp_path / "new"), folder(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        put_in_place(new, out)
    assert content(out) == "out"


def failing(monkeypatch: pytest.MonkeyPatch, numbers: set[int], error: BaseException | None = None) -> None:
    """Where there is no exchange, lets the renames of these numbers fail."""
    rename, done = Path.rename, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done in numbers:
            raise error or OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    monkeypatch.setattr(replace, "exchange", lambda one, other: False)


def test_a_disk_that_does_not_take_the_files_is_told_before_anything_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_json(out / "pastkey.json", {})

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken")

    def write() -> None:
        with whole_folder(out, force=True) as work:
            (work / "a").write_text("a")
            monkeypatch.setattr("os.fsync", broken)

    with pytest.raises(OSError, match="broken"):
        write()
    assert [path.name for path in out.iterdir()] == ["pastkey.json"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_and_all_below_it_is_put_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    sync_tree(tmp_path)
    assert len(synced) == 5
    sync_folder(tmp_path / "none")  # a system that opens no folders


def test_what_killed_processes_left_is_found_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.abcdefg1.partial", ".out.abcdefg2.old", ".out.abcdefg3.partial"):
        (tmp_path / name).mkdir()
    for other in (".out.else.abcdefg1.partial", ".out.abc.partial", ".in.abcdefg1.old"):
        (tmp_path / other).mkdir()
    (tmp_path / ".out.abcdefg4.partial").write_text("a file")
    with held(tmp_path / ".out.abcdefg3.partial"):  # of a living process
        found = leftovers(out)
    assert [sentence.partition(" ")[0] for sentence in found] == [
        str(tmp_path / name) for name in (".out.abcdefg1.partial", ".out.abcdefg2.old")
    ]
    assert all("nothing needs it: remove it" in sentence for sentence in found)
    assert len(leftovers(out)) == 3
    assert leftovers(tmp_path / "none" / "out") == []
