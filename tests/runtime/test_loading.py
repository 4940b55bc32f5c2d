"""A bundle is opened at any place, and by other processes; the modules of an import."""

from __future__ import annotations

import asyncio
import importlib.resources
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pastkey
import pastkey.runtime
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import load, loading

from .conftest import DRAWN


@pytest.fixture(scope="module")
def expected(lm):
    return lm.generate("abc", **DRAWN).ids


def written_by(program: str) -> str:
    """The output of a separate Python."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    return done.stdout if done.returncode == 0 else done.stderr


def zipped(folder: Path, root: str = "", skip: str = "none", **more: bytes | str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != skip:
                archive.write(path, root + path.relative_to(folder).as_posix())
        for name, data in more.items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.mark.parametrize("root", ["", "bundle/"])
def test_from_a_zip_file_and_its_bytes(speaking_bundle, expected, tmp_path, root, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    content = zipped(speaking_bundle.path, root)
    (tmp_path / "b.zip").write_bytes(content)
    for given in (content, memoryview(content), tmp_path / "b.zip", str(tmp_path / "b.zip")):
        with load(given, threads=1) as model:  # type: ignore[arg-type]
            assert model.generate("abc", **DRAWN).ids == expected
            assert list((tmp_path / "temporary").iterdir())
            with pytest.raises(InputError, match="a model that was unpacked cannot be given to another process"):
                pickle.dumps(model)
        assert not list((tmp_path / "temporary").iterdir())


def test_from_a_resource_of_a_package(speaking_bundle, expected, tmp_path, monkeypatch):
    (tmp_path / "packed_bundle").mkdir()
    (tmp_path / "packed_bundle" / "__init__.py").touch()
    shutil.copytree(speaking_bundle.path, tmp_path / "packed_bundle" / "data")
    monkeypatch.syspath_prepend(str(tmp_path))
    resource = importlib.resources.files("packed_bundle")
    assert load(resource / "data", threads=1).generate("abc", **DRAWN).ids == expected  # type: ignore[arg-type]


def test_what_is_no_bundle_is_refused(speaking_bundle, tmp_path):
    whole = zipped(speaking_bundle.path)
    for content, error, words in (
        (b"abc", InputError, "are not a zip file of a bundle folder"),
        (zipped(speaking_bundle.path, skip="pastkey.json"), MissingFileError, r"holds no bundle: it has no pastkey\."),
        (whole[: len(whole) // 2], (InputError, IntegrityError), "zip"),
    ):
        with pytest.raises(error, match=words):
            load(content)


@pytest.mark.parametrize("root", ["", "../../", "/a/../../"])
def test_nothing_is_written_outside_the_temporary_folder(speaking_bundle, expected, tmp_path, monkeypatch, root):
    (folder := tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with load(zipped(speaking_bundle.path, root, **{f"{root}../../../outside": "x"}), threads=1) as model:
        assert model.generate("abc", **DRAWN).ids == expected
        (outside,) = tmp_path.rglob("outside")
        assert folder in outside.parents


def test_errors_inside_a_zip_file_name_the_given_file(speaking_bundle, tmp_path):
    file = tmp_path / "b.zip"
    file.write_bytes(zipped(speaking_bundle.path, skip="pastkey.json", **{"pastkey.json": "{}"}))
    with pytest.raises(InputError, match=re.escape(f"{file / 'pastkey.json'} has no kind; the manifest of a bundle")):
        load(file)
    file.write_bytes(zipped(speaking_bundle.path, skip="model.onnx"))
    for given, name in ((file, f"{file}"), (file.read_bytes(), "the bytes")):
        with pytest.raises(IntegrityError, match=re.escape(f"{name}/onnx/model.onnx is missing")):
            load(given)


FOLDERS = {f"{number}/" + "a/" * 40 + "x": b"" for number in range(60)}  # with an empty file each


@pytest.mark.parametrize("content", [{"a": bytes(80_000_000)}, FOLDERS], ids=["zeros", "folders"])
def test_a_zip_bomb_stops_at_20_times_the_file(content, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {"pastkey.json": b"{}", **content, "unopened/": b""}.items():
            archive.writestr(name, data)
        archive.filelist[-1].compress_size = 0x7FFFFFF0
    with pytest.raises(IntegrityError, match=r"would be unpacked to more than 20 times its [0-9,]+ bytes"):
        load(packed.getvalue())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_bound_no_memory_are_refused(method):
    """bzip2 makes 46 MB of 40 bytes at once, whatever number was asked for."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        archive.writestr("pastkey.json", "{}")
    with pytest.raises(InputError, match=rf"'pastkey.json' in the compression {method}; none \(0\) or deflate \(8\)"):
        load(packed.getvalue())


# --- other processes ----------------------------------------------------------------------------------------------


def test_a_model_is_quiet_and_has_a_logger(speaking_bundle, capfd, caplog):
    threads = threading.active_count()
    with caplog.at_level("DEBUG", "pastkey"):
        load(speaking_bundle.path, threads=1).generate("abc", **DRAWN)
    assert [record.name for record in caplog.records] == ["pastkey"]
    assert "loaded" in caplog.text
    assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")


def test_what_a_file_manager_leaves_in_a_folder_is_passed_over(speaking_bundle, expected, tmp_path):
    """A file that is anything else is refused: onnxruntime might be led to it."""
    folder = tmp_path / "b"
    shutil.copytree(speaking_bundle.path, folder)
    for left in (".DS_Store", "._pastkey.onnx", "Thumbs.db"):
        (folder / "onnx" / left).write_bytes(b"x")
    assert load(folder, threads=1).generate("abc", **DRAWN).ids == expected
    (folder / "onnx" / "other.onnx_data").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"other\.onnx_data is not listed in pastkey\.json: it was added"):
        load(folder)


FORKS = """
import os, sys, warnings, pastkey
warnings.simplefilter("ignore")
model = pastkey.load({path!r}, threads=1)
folder = model.bundle.path
for closes in (True, False):
    child = os.fork()
    if not child:
        if closes: model.close()
        sys.exit(0)
    os.waitpid(child, 0)
    print(folder.is_dir(), flush=True)
print(model.generate("abc", **{settings}).ids == {expected})
model.close()
print(folder.exists())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_leaves_the_unpacked_files_where_they_are(speaking_bundle, expected, tmp_path):
    """Whether it closes the model or ends; in a separate process, for the atexit handlers of pytest."""
    (tmp_path / "b.zip").write_bytes(zipped(speaking_bundle.path))
    program = FORKS.format(path=str(tmp_path / "b.zip"), settings=DRAWN, expected=expected)
    assert written_by(program) == "True\nTrue\nTrue\nFalse\n"


def test_an_event_loop_goes_on_while_a_model_is_loaded(speaking_bundle, expected, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any, **settings: Any) -> Bundle:
        began.set()
        assert go_on.wait(60)
        return open_bundle(*arguments, **settings)

    monkeypatch.setattr(loading, "open_bundle", slow)

    async def load_beside_others() -> list[int]:
        task = asyncio.create_task(pastkey.aload(speaking_bundle.path, threads=1))
        while not began.is_set():
            await asyncio.sleep(0.001)
        go_on.set()  # which a blocked loop would not reach
        with await task as model:
            return (await model.agenerate("abc", **DRAWN)).ids

    assert asyncio.run(load_beside_others()) == expected
    with pytest.raises(InputError, match="threads is 'a'"):
        asyncio.run(pastkey.aload(speaking_bundle.path, threads="a"))  # type: ignore[arg-type]


# --- the modules of an import ---------------------------------------------------------------------------------------
# Prints what the loop's own thread imports, and then what there is.
IMPORTS_BESIDE = """
import asyncio, sys, threading
import pastkey
import pastkey.runtime
LIBRARIES = {{"numpy", "onnxruntime", "tokenizers", "pastkey.runtime.loading"}}

class Spy:
    def find_spec(self, name, path, target=None):
        if name in LIBRARIES and threading.current_thread() is threading.main_thread():
            print(name)

async def main():
    sys.meta_path.insert(0, Spy())
    assert not LIBRARIES & set(sys.modules)
    with await pastkey.aload({path!r}, threads=1) as model:
        print(LIBRARIES <= set(sys.modules), len(model.generate([1, 2], max_new_tokens=3).ids))

asyncio.run(main())
"""


def test_the_first_load_of_a_process_imports_nothing_heavy_in_the_loop(fused_bundle):
    assert written_by(IMPORTS_BESIDE.format(path=str(fused_bundle.path))) == "True 3\n"


def test_everything_that_is_offered_is_there():
    offered: list[str] = vars(pastkey.runtime)["__all__"]
    for name in offered:
        assert getattr(pastkey.runtime, name).__name__.rpartition(".")[2] == name
    assert set(offered) <= set(dir(pastkey.runtime))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pastkey.runtime.nothing  # type: ignore[attr-defined]


BROUGHT = "import sys, {before}; before = set(sys.modules); import {module}; print(*sys.modules.keys() - before)"


@pytest.mark.parametrize(
    ("module", "before", "limit"),
    [
        ("pastkey", "sys", 60),  # 6 to 38, depending on the modules that Python itself imports at its start
        ("pastkey.runtime", "sys", 60),
        ("pastkey.runtime.model.language_model", "numpy, onnxruntime, tokenizers", 192),  # 80 of them pastkey's
    ],
)
def test_imports_are_few(module, before, limit):
    brought = written_by(BROUGHT.format(module=module, before=before)).split()
    assert module in brought
    assert {name.partition(".")[0] for name in brought} - sys.stdlib_module_names <= {"pastkey", *before.split(", ")}
    assert len(brought) < limit
