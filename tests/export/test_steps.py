"""Steps that a killed or failed export leaves: a later one goes on from them, or removes them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import IntegrityError, MissingFileError
from pastkey.export import export, grafting, pipeline
from pastkey.export.graph.write.weights_file import WeightsFile
from pastkey.export.progress import Progress
from pastkey.export.settings import ExportConfig
from pastkey.export.source import pretrained
from pastkey.export.steps import FP32, QUANTIZED, TEXT, Steps, identity, require_unchanged
from pastkey.files.durable import STEPS

from .decoders import Plain

KILLED = """
import os, signal, sys
from pastkey.export import export
from pastkey.export.steps import Steps

finish = Steps.finish

def finish_and_die(self, name, *rest):
    finish(self, name, *rest)
    if name == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

Steps.finish = finish_and_die
export(sys.argv[1], sys.argv[2])
"""


KILLED_AT_A_STAGE = """
import os, signal, sys
from pastkey.export import export
from pastkey.export.progress import Progress

class Killing(Progress):
    left = int(sys.argv[3])

    def stage(self, name):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

export(sys.argv[1], sys.argv[2], progress=Killing())
"""


class Heard(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.stages: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def stage(self, name: str) -> None:
        self.stages.append(name)


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.partial"))


# --- kills --------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL, and no locks of folders")
@pytest.mark.parametrize(
    "step", [pytest.param(FP32, marks=pytest.mark.slow), pytest.param(TEXT, marks=pytest.mark.matrix), QUANTIZED]
)
def test_an_export_goes_on_from_the_step_after_which_another_was_killed(
    step, checkpoint, trained, tmp_path, monkeypatch
):
    out, expected = tmp_path / "bundle", open_bundle(trained)
    subprocess.run([sys.executable, "-c", KILLED, checkpoint, out, step], check=False)
    assert not out.exists()
    assert len(leftovers(tmp_path)) == 1

    def again(*_: object, **__: object) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(grafting, "trace", again)
    if step != FP32:
        monkeypatch.setattr(pipeline, "calibration_text", again)
    if step == QUANTIZED:
        monkeypatch.setattr(pipeline, "_MAKERS", {"int8": again})
    heard = Heard()
    report = export(checkpoint, out, resume=True, progress=heard)
    assert any(sentence.startswith("resumed: the float32 graph") for sentence in heard.said)
    assert not any("float32" in stage or "fp32" in stage for stage in heard.stages)
    assert report.manifest.files == expected.manifest.files
    assert report.manifest.quality == expected.manifest.quality
    assert open_bundle(out, verify=True).manifest.parity == expected.manifest.parity
    assert not leftovers(tmp_path)


@pytest.mark.matrix
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL, and no locks of folders")
@pytest.mark.parametrize("stage", range(1, 9))
def test_a_kill_at_the_beginning_of_any_stage_leaves_nothing_half_written(stage, checkpoint, trained, tmp_path):
    out, expected = tmp_path / "bundle", open_bundle(trained)
    done = subprocess.run([sys.executable, "-c", KILLED_AT_A_STAGE, checkpoint, out, str(stage)], check=False)
    assert done.returncode < 0
    assert not out.exists()
    assert export(checkpoint, out, resume=True).manifest.files == expected.manifest.files
    assert open_bundle(out, verify=True).manifest.quality == expected.manifest.quality
    assert not leftovers(tmp_path)


def test_an_export_without_resume_removes_the_steps_and_says_so(tmp_path):
    (tmp_path / ".bundle.0123abcd.partial" / STEPS).mkdir(parents=True)
    heard = Heard()
    with pytest.raises(MissingFileError):
        export(tmp_path / "missing", tmp_path / "bundle", progress=heard)
    if sys.platform == "win32":  # it has no locks of folders
        return
    assert heard.said == [
        f"removed the finished steps of an earlier export to {tmp_path / 'bundle'}, from which --resume would have "
        "gone on"
    ]
    assert not list(tmp_path.iterdir())


# --- failures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_disk_that_fills_while_a_shard_is_written_is_one_sentence(resume, checkpoint, tmp_path, monkeypatch, capsys):
    def full(self: WeightsFile) -> None:
        if ".fp32" not in self.path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def place(self: WeightsFile, content: Any) -> Any:
        placed = original(self, content)
        if placed[0].endswith("_1"):
            full(self)
        return placed

    original = WeightsFile.place
    monkeypatch.setattr(WeightsFile, "place", place)
    flags = ["--shard-size", "9000", *(["--resume"] if resume else [])]
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "bundle"), *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pastkey export: the disk is full: ")
    assert not (tmp_path / "bundle").exists()
    (*left,) = leftovers(tmp_path)
    assert len(left) == resume
    if resume:
        kept = {path.name for path in (left[0] / STEPS).iterdir()}
        assert kept == {f"{FP32}.json", f"{TEXT}.json"}
        monkeypatch.undo()
        assert main(["export", str(checkpoint), "--out", str(tmp_path / "bundle"), *flags]) == 0
        assert "resumed: the float32 graph, the calibration text of the export before" in capsys.readouterr().err
        assert not leftovers(tmp_path)


def test_a_module_has_no_steps(tmp_path, capsys):
    assert identity(Plain(), ExportConfig()) is None
    assert main(["export", "mine.py:make", "--out", str(tmp_path / "bundle"), "--resume"]) == 2
    assert "--resume is for a source in files, and this is a module" in capsys.readouterr().err


# --- keys ---------------------------------------------------------------------------------------------------------
def filled(folder: Path, source: dict[str, Any], config: ExportConfig) -> Steps:
    """Three finished steps in a folder."""
    steps = Steps(folder, config, source, Progress())
    for name, file in ((FP32, ".fp32/onnx/a"), (TEXT, None), (QUANTIZED, "onnx/b")):
        if file is not None:
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_bytes(b"123")
        steps.finish(name, {"of": name}, None if file is None else (folder / file).parent)
    return steps


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"force": True, "generate": True, "resume": True}, 3),
        ({"max_kl": 0.1}, 2),
        ({"shard_size": "2GB"}, 2),
        ({"precision": "int4"}, 1),
        ({"calibration": "other"}, 1),
        ({"quick": True}, 0),
        ({"context_length": 16}, 0),
        ({"precision": "fp32"}, 0),
    ],
)
def test_a_step_of_other_options_is_made_again_with_those_after_it(options, kept, tmp_path):
    filled(tmp_path, {"a": 1}, ExportConfig())
    (tmp_path / "onnx" / "unfinished").write_bytes(b"")
    (tmp_path / ".ort-1").mkdir()
    steps = Steps(tmp_path, ExportConfig(**options), {"a": 1}, Progress())
    found = [name for name in (FP32, TEXT, QUANTIZED) if steps.found(name) is not None]
    assert found == [FP32, TEXT, QUANTIZED][:kept]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"{STEPS}/{name}.json" for name in found} | {
        file for file, step in ((".fp32/onnx/a", FP32), ("onnx/b", QUANTIZED)) if step in found
    }
    assert not (tmp_path / ".ort-1").exists()


@pytest.mark.parametrize("spoilt", ["source", "file", "record", "missing"])
def test_a_step_of_another_source_or_with_other_files_is_made_again(spoilt, tmp_path):
    filled(tmp_path, {"a": 1}, ExportConfig())
    if spoilt == "file":
        (tmp_path / ".fp32/onnx/a").write_bytes(b"12")
    elif spoilt == "record":
        (tmp_path / STEPS / f"{FP32}.json").write_text("{")
    elif spoilt == "missing":
        shutil.rmtree(tmp_path / ".fp32")
    steps = Steps(tmp_path, ExportConfig(), {"a": 2 if spoilt == "source" else 1}, Progress())
    assert [steps.found(name) for name in (FP32, TEXT, QUANTIZED)] == [None] * 3
    assert not list(tmp_path.iterdir())


def test_records_and_the_float32_bundle_are_not_in_the_bundle(tmp_path):
    steps = filled(tmp_path, {"a": 1}, ExportConfig())
    steps.remove()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["onnx", "onnx/b"]


# --- a source that changes ----------------------------------------------------------------------------------------
def test_a_source_that_changes_under_an_export_is_refused(tmp_path):
    source, config = tmp_path / "model", ExportConfig()
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(bytes(3 << 20))
    before = identity(source, config)
    require_unchanged(source, config, before)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(IntegrityError, match=r"model changed while it was exported \(model\.safetensors\): export it"):
        require_unchanged(source, config, before)
    # A checkpoint was read as a whole, and training goes on.
    (source / names.MANIFEST).write_text(json.dumps({}))
    require_unchanged(source, config, before)


def test_a_source_that_changes_while_its_weights_are_read_is_refused(llama_folder, tmp_path, monkeypatch):
    original = pretrained._load

    def load(*args: Any, **options: Any) -> Any:
        loaded = original(*args, **options)
        os.utime(llama_folder / "model.safetensors", ns=(1, 1))
        return loaded

    monkeypatch.setattr(pretrained, "_load", load)
    config = ExportConfig()
    _, before = pipeline._open(llama_folder, tmp_path / "bundle", config, Progress())
    with pytest.raises(IntegrityError, match=r"changed while it was exported \(model\.safetensors\)"):
        require_unchanged(llama_folder, config, before)
