"""Steps that a killed or failed export leaves: a later one goes on from them, or removes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import IntegrityError
from pastkey.export import export, grafting, pipeline
from pastkey.export.progress import Progress
from pastkey.export.settings import ExportConfig
from pastkey.export.source import pretrained
from pastkey.export.steps import FP32, QUANTIZED, TEXT, identity, require_unchanged

from ..shared import divided

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
@pytest.mark.parametrize("step", divided([FP32, TEXT, QUANTIZED]))
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


# --- failures -----------------------------------------------------------------------------------------------------
# --- keys ---------------------------------------------------------------------------------------------------------
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
