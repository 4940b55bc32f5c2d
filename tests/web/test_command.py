"""`pastkey web` writes the site to a folder, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable

from pastkey.web import site

from ..runtime import conftest as decoder
from . import test_site

tiny, letters, make_bundle, talking = decoder.tiny, decoder.letters, decoder.make_bundle, decoder.talking
libraries = test_site.libraries
Command = Callable[..., tuple[int, str, str]]


def test_the_folder_has_the_files_of_the_site(command, talking, tmp_path):
    out = tmp_path / "out"
    status, _, said = command("web", talking, "--out", out)
    assert (status, said) == (0, f"{out}: try it with  python -m http.server -d {out}  at http://localhost:8000\n")
    written = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert written == {
        name: content if isinstance(content, bytes) else content.read_bytes() for name, content in site(talking).items()
    }


def test_force_replaces_a_folder_of_its_own_and_no_other(command, talking, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("Dear")
    assert command("web", talking, "--out", out)[0] == 0
    assert command("web", talking, "--out", out)[0] == 2
    assert command("web", talking, "--out", out, "--force")[0] == 0
    status, _, said = command("web", talking, "--out", other, "--force")
    assert status == 2
    assert "pastkey did not write it" in said


def test_a_bundle_of_slow_operators_says_what_to_export(command, talking, tmp_path, monkeypatch):
    monkeypatch.setattr(test_site.module, "slow_on_cpu", lambda bundle: True)
    assert (
        "pastkey export SOURCE --out BUNDLE --target portable" in command("web", talking, "--out", tmp_path / "out")[2]
    )


def test_a_folder_without_a_bundle_leaves_nothing(command, tmp_path):
    assert command("web", tmp_path, "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()
