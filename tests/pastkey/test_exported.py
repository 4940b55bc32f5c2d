"""`chat` and `run` export a source once, in a separate process, and open that bundle from then on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pastkey import exported as module
from pastkey.errors import MissingFileError, ResourceError
from pastkey.exported import exported

POPEN = subprocess.Popen
Exports = list[tuple[str, Path]]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pastkey" / "bundles"


@pytest.fixture
def exports(monkeypatch, cache):
    """The exported sources, by something quick instead of an export."""
    found: Exports = []

    def quickly(source: str, target: Path) -> None:
        found.append((source, target))
        time.sleep(0.05)
        target.mkdir()
        (target / "whole").touch()

    def open_quickly(bundle: Path) -> None:
        if not (bundle / "whole").exists():
            raise MissingFileError(f"{bundle / 'whole'} is missing")

    monkeypatch.setattr(module, "_export", quickly)
    monkeypatch.setattr(module, "open_bundle", open_quickly)
    return found


def test_a_source_is_exported_once_and_then_opened_where_the_cache_is_read_only(exports, cache, monkeypatch):
    first = exported("org/name")
    monkeypatch.setattr(Path, "touch", lambda path: pytest.fail("writes"))
    assert exported("org/name") == first == str(cache / "org--name")
    assert exports == [("org/name", cache / "org--name")]


def test_a_damaged_export_is_made_again(exports, capsys):
    Path(exported("org/name"), "whole").unlink()
    bundle = Path(exported("org/name"))
    assert len(exports) == 2
    assert (bundle / "whole").exists()
    assert f"the export of org/name in {bundle} is damaged: it is made again" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["bundle", "not/here/at all", "absent.gguf", "bundle.zip", "-"])
def test_any_other_path_stays_as_it_is(exports, given):
    for name in ("pastkey.json", "config.json"):
        write(Path("bundle", name), "{}", 1)
    assert exported(given) == given
    assert exports == []


def test_a_source_that_is_not_trusted_is_not_exported(exports, command):
    write(Path("folder", "config.json"), "{}", 1)
    for words, source in ((["chat"], "org/name"), (["run", "--prompt", "x"], "folder")):
        status, _, told = command(*words, "--untrusted", source)
        assert status == 2
        assert f"{source} is a model to export, and --untrusted opens only a bundle" in told
        assert f"pastkey export {source} --out bundle" in told
    assert exports == []


def write(path: Path, text: str, when: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(when, when))


@pytest.mark.parametrize(
    ("source", "file"),
    [("model.gguf", "model.gguf"), ("model.gguf", "tokenizer.json"), ("folder", "folder/onnx/model.onnx")],
)
def test_a_source_that_changed_is_exported_again_and_the_older_one_removed(exports, cache, source, file):
    Path("model.gguf").touch()
    write(Path("folder", "config.json"), "{}", 1)
    write(Path(file), "one", 1)
    first = exported(source)
    assert exported(str(Path(source).resolve())) == first
    write(Path(file), "two", 1)
    write(Path("folder", ".hidden"), "", 1)
    write(Path("folder", "bundle", "pastkey.json"), "", 1)
    assert exported(source) == first  # the same size at the same time, and files that an export does not read
    write(Path(file), "two", 2)
    second = exported(source)
    assert len(exports) == 2
    assert [path for path in cache.iterdir() if path.is_dir()] == [Path(second)]


def test_several_processes_export_once(exports, capsys):
    """Locks are of open files: threads represent processes."""
    with ThreadPoolExecutor(4) as threads:
        assert len({*threads.map(exported, ["org/name"] * 4)}) == 1
    assert len(exports) == 1
    assert "another process exports org/name: waiting for its end" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(exports, cache, monkeypatch):
    cache.parent.parent.write_text("a file")
    with pytest.raises(ResourceError, match="name another with XDG_CACHE_HOME, or type  pastkey export org/name --out"):
        exported("org/name")
    monkeypatch.setattr(module, "user_cache_file", lambda name: None)
    with pytest.raises(ResourceError, match="there is no home folder to keep the export of org/name in: type  pastkey"):
        exported("org/name")


def child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Runs this program instead of an export; its last argument is the target."""

    def instead(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return POPEN([sys.executable, "-c", program, command[-1]], **options)

    monkeypatch.setattr(subprocess, "Popen", instead)


def test_an_export_that_fails_or_is_killed_ends_the_command(cache, monkeypatch):
    child(monkeypatch, "raise SystemExit(2)")
    with pytest.raises(SystemExit, match=r"^2$"):
        exported("org/name")
    child(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ResourceError, match="the export of org/name was ended by signal 9"):
        exported("org/name")


def test_ctrl_c_ends_the_export_which_removes_what_it_wrote(cache, monkeypatch):
    program = (
        "import pathlib, signal, sys, time\npartial = pathlib.Path(sys.argv[1] + '.partial')\npartial.touch()\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "try:\n    time.sleep(60)\nfinally:\n    time.sleep(0.5); partial.unlink()\n"
    )
    child(monkeypatch, program)
    pressing = threading.Thread(target=_press_when, args=(cache / "org--name.partial",))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        exported("org/name")
    pressing.join()
    signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in cache.iterdir()) == ["org--name.lock"]


def _press_when(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_the_export_imports_nothing_of_the_current_folder(cache, monkeypatch):
    """A model's folder may hold a random.py."""
    commands: list[list[str]] = []

    def instead(command: list[str], **options: Any) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", instead)
        with pytest.raises(KeyboardInterrupt):
            exported("org/name")
    assert commands[0][-4:] == ["export", "org/name", "--out", str(cache / "org--name")]
    for name in ("random", "json", "pastkey"):
        Path(f"{name}.py").write_text("raise SystemExit('hidden')")
    done = subprocess.run([*commands[0][:-4], "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:8], done.stderr) == (0, "pastkey ", "")
