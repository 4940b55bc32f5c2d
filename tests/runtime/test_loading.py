"""A bundle is opened wherever it lies, and taken along by other processes."""

from __future__ import annotations

import asyncio
import importlib.resources
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pastkey
from pastkey.contract.bundle import Bundle, open_bundle
from pastkey.errors import InputError, IntegrityError, MissingFileError
from pastkey.runtime import load, loading

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def expected(speaking_bundle):
    return load(speaking_bundle.path, threads=1).generate("abc", **SETTINGS).ids


def zipped(folder: Path, root: str = "", skip: str = "none") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != skip:
                archive.write(path, root + path.relative_to(folder).as_posix())
    return content.getvalue()


@pytest.mark.parametrize("root", ["", "bundle/"])
def test_from_a_zip_file_and_its_bytes(speaking_bundle, expected, tmp_path, root, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    content = zipped(speaking_bundle.path, root)
    (tmp_path / "b.zip").write_bytes(content)
    for given in (content, memoryview(content), tmp_path / "b.zip", str(tmp_path / "b.zip")):
        with load(given, threads=1) as model:  # type: ignore[arg-type]
            assert model.generate("abc", **SETTINGS).ids == expected
            assert list((tmp_path / "temporary").iterdir())
            with pytest.raises(InputError, match="a model that was unpacked cannot be given to another process"):
                pickle.dumps(model)
        assert not list((tmp_path / "temporary").iterdir())


def test_from_a_resource_of_a_package(speaking_bundle, expected, tmp_path, monkeypatch):
    """In a folder, and in a zip file that Python imports from."""
    content = zipped(speaking_bundle.path, "packed_bundle/data/")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path / "folder")
    (tmp_path / "folder" / "packed_bundle" / "__init__.py").touch()
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive, zipfile.ZipFile(io.BytesIO(content)) as inner:
        for name in inner.namelist():
            archive.writestr(name, inner.read(name))
        archive.writestr("packed_bundle/__init__.py", "")
    for place in ("folder", "p.zip"):
        monkeypatch.syspath_prepend(str(tmp_path / place))
        sys.modules.pop("packed_bundle", None)
        resource = importlib.resources.files("packed_bundle")
        assert load(resource / "data", threads=1).generate("abc", **SETTINGS).ids == expected
        with pytest.raises(MissingFileError):
            load(resource / "nothing")
        sys.path.remove(str(tmp_path / place))


def test_what_is_no_bundle_is_refused(speaking_bundle, tmp_path):
    with pytest.raises(InputError, match="are not a zip file of a bundle folder"):
        load(b"abc")
    with pytest.raises(MissingFileError, match=r"holds no bundle: it has no pastkey\.json"):
        load(zipped(speaking_bundle.path, skip="pastkey.json"))
    with pytest.raises(IntegrityError):
        load(zipped(speaking_bundle.path, skip="model.onnx"))
    content = zipped(speaking_bundle.path)
    with pytest.raises((InputError, IntegrityError)):
        load(content[: len(content) // 2])
    outside = io.BytesIO(content)
    with zipfile.ZipFile(outside, "a") as archive:
        archive.writestr("../outside", "x")
    with pytest.raises(IntegrityError, match=r"names '\.\./outside', which is not a path inside the folder"):
        load(outside.getvalue())
    assert not (tmp_path.parent / "outside").exists()


def test_errors_inside_a_zip_file_name_the_given_file(speaking_bundle, tmp_path):
    """The last of two entries of one name counts."""
    file = tmp_path / "b.zip"
    file.write_bytes(zipped(speaking_bundle.path))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("pastkey.json", "{}")
    with pytest.raises(InputError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file / 'pastkey.json'} has no kind; the manifest of a bundle was expected")
    file.write_bytes(zipped(speaking_bundle.path, skip="model.onnx"))
    for given, name in ((file, f"{file}"), (file.read_bytes(), "the bytes")):
        with pytest.raises(IntegrityError) as missing:
            load(given)
        assert str(missing.value).startswith(f"{name}/onnx/model.onnx is missing")


def folders_of(count: int) -> dict[str, bytes]:
    """Empty files in folders of their own, 40 deep."""
    return {f"{number}/" + "a/" * 40 + "x": b"" for number in range(count)}


@pytest.mark.parametrize("content", [{"a": bytes(80_000_000)}, folders_of(60)], ids=["zeros", "folders"])
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


def test_a_process_that_is_spawned_takes_a_model(speaking_bundle, expected):
    program = (
        "import multiprocessing, pastkey\n"
        "def answer(model, queue):\n"
        f"    queue.put(model.generate('abc', **{SETTINGS}).ids)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        f"    model = pastkey.load({str(speaking_bundle.path)!r}, threads=1)\n"
        "    process = context.Process(target=answer, args=(model, queue))\n"
        "    process.start()\n"
        "    print(queue.get(timeout=60))\n"
        "    process.join()\n"
    )
    path = speaking_bundle.path.parent / "spawn.py"
    path.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == f"{expected}\n"


def test_a_model_is_quiet_and_has_a_logger(speaking_bundle, capfd, caplog):
    threads = threading.active_count()
    with caplog.at_level("DEBUG", "pastkey"):
        load(speaking_bundle.path, threads=1).generate("abc", **SETTINGS)
    assert [record.name for record in caplog.records] == ["pastkey"]
    assert "loaded" in caplog.text
    time.sleep(0)
    assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")


def test_what_a_file_manager_leaves_in_a_folder_is_passed_over(speaking_bundle, expected, tmp_path):
    """A file that is anything else is refused: onnxruntime might be led to it."""
    with zipfile.ZipFile(io.BytesIO(zipped(speaking_bundle.path))) as archive:
        archive.extractall(tmp_path)
    for left in (".DS_Store", "._pastkey.onnx", "Thumbs.db"):
        (tmp_path / "onnx" / left).write_bytes(b"x")
    assert load(tmp_path, threads=1).generate("abc", **SETTINGS).ids == expected
    (tmp_path / "onnx" / "other.onnx_data").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"other\.onnx_data is not listed in pastkey\.json: it was added"):
        load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_leaves_the_unpacked_files_where_they_are(speaking_bundle, expected, tmp_path):
    """Whether it closes the model or ends; in a process of its own, for the atexit handlers of pytest."""
    (tmp_path / "b.zip").write_bytes(zipped(speaking_bundle.path))
    program = (
        "import os, sys, warnings, pastkey\n"
        "warnings.simplefilter('ignore')\n"
        f"model = pastkey.load({str(tmp_path / 'b.zip')!r}, threads=1)\n"
        "folder = model.bundle.path\n"
        "for closes in (True, False):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        if closes: model.close()\n"
        "        sys.exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "    print(folder.is_dir(), flush=True)\n"
        f"print(model.generate('abc', **{SETTINGS}).ids == {expected})\n"
        "model.close()\n"
        "print(folder.exists())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout == "True\nTrue\nTrue\nFalse\n", done.stderr


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
        go_on.set()  # which a loop that stands still would not come to
        with await task as model:
            return (await model.agenerate("abc", **SETTINGS)).ids

    assert asyncio.run(load_beside_others()) == expected
    with pytest.raises(InputError, match="threads is 'a'"):
        asyncio.run(pastkey.aload(speaking_bundle.path, threads="a"))  # type: ignore[arg-type]
