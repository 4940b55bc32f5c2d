"""`pastkey export` as a user types it: exit status, one sentence, one JSON object."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.export.compat import configs
from pastkey.export.source.factory import call_factory
from pastkey.runtime import load

from ..shared import divided
from .commands import FACTORY, fails
from .source.opening import write_notebook


def test_a_checkpoint_becomes_a_bundle_that_generates(trained, checkpoint):
    bundle = open_bundle(trained, verify=True)
    assert (bundle.manifest.precision, bundle.manifest.graph) == ("int8", "fused")
    assert bundle.manifest.eos_token_ids == (60,)
    assert (trained / names.TOKENIZER).read_bytes() == (checkpoint / names.TOKENIZER).read_bytes()
    assert json.loads((trained / names.CONFIG).read_text())["model_type"] == "llama"
    special = json.loads((trained / names.GENERATION_CONFIG).read_text())
    assert (special["eos_token_id"], special["pad_token_id"]) == (60, 60)
    completion = load(trained).generate("w1 w2 w3", max_new_tokens=4)
    assert completion.text.split()
    assert set(completion.text.split()) <= {f"w{i}" for i in range(60)}


def test_json_is_one_object_whatever_the_module_prints(factory, tmp_path, command):
    out = tmp_path / "bundle"
    choices = ("--precision", "fp32", "--graph", "standard", "--json")
    status, printed, told = command("export", f"{factory}:Small", "--context", 12, "--out", out, *choices)
    assert status == 0
    report = json.loads(printed)
    assert printed.count("\n") == 1
    assert (report["bundle"], report["precision"], report["graph"]) == (str(out), "fp32", "standard")
    assert report["graph_reason"] == "asked for"
    assert report["parity"]["fp32"]["ok"] is True
    assert "number of parameters: many" in told


def test_without_json_nothing_is_on_standard_output(factory, tmp_path, command):
    arguments = ("export", f"{factory}:Small", "--context", 12, "--out", tmp_path / "bundle")
    status, printed, told = command(*arguments)
    assert (status, printed) == (0, "")
    assert "float32 against the source, 12 tokens: equal" in told
    assert "KL divergence" in told
    assert f"next:  pastkey run {tmp_path / 'bundle'} --prompt-ids" in told
    # a second time, the folder is there
    before = (tmp_path / "bundle" / names.MANIFEST).stat().st_mtime_ns
    fails(command(*arguments), f"{tmp_path / 'bundle'} already exists", "--force")
    assert (tmp_path / "bundle" / names.MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{file}:Small",), ("Small has no context length", "--context N")),
        (("{file}:Small", "--context", "0"), ("--context", "0 is not a whole number from 1")),
        (("{file}:Small", "--context", "13"), ("fails on 13 tokens, the context that was asked for", "mine.py:")),
        (("{file}:Small", "--context", "12", "--tokenizer", "{folder}/no.json"), ("no such tokenizer", "no.json")),
        (("{folder}/none",), ("no such source", "none does not exist")),
        (("{file}:NotCausal", "--context", "12"), ("cannot be given a cache: mine.py:", "a later one")),
        (("{file}:Small", "--context", "12", "--eos", "36,37"), ("--eos 37 is not a token of Small",)),
        (("{file}:Small", "--context", "12", "--eos=-1"), ("eos is [-1]; it must be a token id",)),
        (("{file}:Small", "--context", "12", "--eos", "end"), ("--eos 'end' is the name of a token",)),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, words, factory, tmp_path, command):
    filled = [argument.format(file=factory, folder=factory.parent) for argument in arguments]
    fails(command("export", *filled, "--out", tmp_path / "bundle", "--json"), *words)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_replaced_by_its_own_bundle(checkpoint, tmp_path, command):
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    fails(command("export", copy, "--out", f"{copy}/", "--force"), "is the source of this export, and would be")
    for table in (copy, copy / "nowhere" / "table.json", copy / "table.json"):
        words = f"--sensitivity {table}: expected a file outside {copy}, in an existing folder"
        fails(command("export", copy, "--out", copy, "--force", "--sensitivity", table), words)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_a_full_disk_is_one_sentence(factory, tmp_path, command, monkeypatch):
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(configs, "write_json", full)
    result = command("export", f"{factory}:Small", "--context", 12, "--precision", "fp32", "--out", tmp_path / "bundle")
    fails(result, "the disk is full", "nothing half-written was kept")
    assert not list(tmp_path.iterdir())


STOPS = [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)]


@pytest.mark.parametrize(("number", "status", "force"), divided(STOPS, quick=STOPS[:1], ci=STOPS))
@pytest.mark.slow
def test_an_export_that_is_stopped_leaves_nothing_and_loses_nothing(number, status, force, small, tmp_path):
    """Stopped while the bundle's first files are there: the module waits in the verification until the signal comes."""
    module = tmp_path / "waits.py"
    waiting = "class Waits(Small):\n    def forward(self, input_ids, position_ids):\n        import glob, time\n"
    waiting += "        while glob.glob('work/.bundle.*.partial/.fp32/onnx/*.onnx'):\n            time.sleep(0.01)\n"
    module.write_text(FACTORY + waiting + "        return super().forward(input_ids, position_ids)\n")
    work = tmp_path / "work"
    work.mkdir()
    if force:
        shutil.copytree(small, work / "bundle")
    arguments = ["export", f"{module}:Waits", "--context", "12", "--out", "work/bundle", *["--force"] * force]
    process = subprocess.Popen(
        [sys.executable, "-m", "pastkey", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in the background ignore
    )
    with process:
        try:
            while not list(work.glob(".bundle.*.partial/.fp32/onnx/*.onnx")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            told = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == status
    assert "Traceback" not in told
    assert [path.name for path in work.iterdir()] == ["bundle"] * force
    if force:
        open_bundle(work / "bundle", verify=True)


# --- what comes with an own decoder ---------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_notebook_its_weights_its_characters_and_its_end_go_the_whole_way(tmp_path, command, capsys):
    """From cells that would train to text, and `verify` and `eval` with the same weights."""
    trains = "model = Small()\nfor step in range(3):\n    raise SystemError('training')"
    write_notebook(tmp_path / "lesson.ipynb", "%pip install torch", FACTORY, trains)
    (tmp_path / "mine.py").write_text(FACTORY)
    characters = "abcdefghijklmnopqrstuvwxyz .,!?\n'-:;("
    (tmp_path / "characters.json").write_text(json.dumps({"stoi": {c: i for i, c in enumerate(characters)}}))
    module, _ = call_factory(tmp_path / "mine.py", "Small")
    capsys.readouterr()  # what the module prints
    state = {f"_orig_mod.{name}": weight + 0.25 for name, weight in module.state_dict().items()}
    torch.save({"model": state, "step": 3}, tmp_path / "ckpt.pt")
    bundle, source = tmp_path / "bundle", ("--weights", tmp_path / "ckpt.pt")
    chosen = ("--tokenizer", tmp_path / "characters.json", "--eos", "3", "--eos", "7,9", "--precision", "fp32")
    arguments = ("export", f"{tmp_path}/lesson.ipynb:model", *source, "--context", 12, *chosen, "--out", bundle)
    status, out, told = command(*arguments, "--json")
    assert status == 0, told
    assert "without '_orig_mod.' in their names" in " ".join(json.loads(out)["warnings"])
    assert open_bundle(bundle).manifest.eos_token_ids == (3, 7, 9)
    assert command("verify", bundle, f"{tmp_path}/mine.py:Small", *source)[0] == 0
    assert command("verify", bundle, f"{tmp_path}/mine.py:Small")[0] == 1
    (tmp_path / "text").write_text("hello, is it me? ")
    reference = ("--reference", f"{tmp_path}/lesson.ipynb:Small()", *source)
    status, out, _ = command("eval", bundle, "--text", tmp_path / "text", *reference, "--json")
    assert status == 0
    assert json.loads(out)["kl_divergence"] < 1e-9


# --- what a source has to say -------------------------------------------------------------------------------------
FROM_TWO = """
class FromTwo(Small):
    def forward(self, input_ids, position_ids=None):
        default = torch.arange(2, 2 + input_ids.shape[1])[None]
        return super().forward(input_ids, default if position_ids is None else position_ids)
"""


@pytest.mark.slow
def test_each_call_that_an_export_offers_works_as_it_is_typed(factory, tmp_path, command):
    file, out = tmp_path / "from_two.py", tmp_path / "bundle"
    file.write_text(factory.read_text() + FROM_TWO)
    choices = ("export", f"{file}:FromTwo", "--context", 10, "--precision", "fp32", "--out", out, "--force")
    fails(command(*choices), "FromTwo runs as model(ids) and as model(ids, position_ids=positions)")
    for call in ("model(ids)", "model(ids, position_ids=positions)"):
        status, printed, told = command(*choices, "--call", call)
        assert (status, printed) == (0, "")
        assert told.count(f"graph of 1 layers of {call} (") == 1
        manifest = open_bundle(out).manifest
        assert (manifest.call, manifest.padding) == (call, True)
        status, _, told = command("verify", out, f"{file}:FromTwo")
        assert status == 0, told
