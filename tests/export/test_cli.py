"""`pastkey export` and `pastkey verify` as a user types them: exit status, one sentence, one JSON object."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pastkey import names
from pastkey.__main__ import main
from pastkey.bundle import open_bundle
from pastkey.export import files
from pastkey.runtime import load

from .test_verify import alter_weight

Result = tuple[int, str, str]  # exit status, standard output, standard error
Command = Callable[..., Result]

FACTORY = """
import torch, torch.nn.functional as F
from torch import nn

class Small(nn.Module):
    def __init__(self, vocab=37):
        super().__init__()
        torch.manual_seed(0)
        print("number of parameters: many")
        self.token, self.position = nn.Embedding(vocab, 16), nn.Embedding(12, 16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, vocab)

    def forward(self, input_ids, position_ids):
        x = self.token(input_ids) + self.position(position_ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])

class NotCausal(Small):
    def forward(self, input_ids, position_ids):
        print("forward")
        x = self.token(input_ids) + self.position(position_ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v)[:, 0])

class Baked(Small):
    def forward(self, input_ids, position_ids):
        if torch.compiler.is_exporting():
            position_ids = position_ids * 0
        return super().forward(input_ids, position_ids)

def other_weights():
    module = Small()
    with torch.no_grad():
        module.head.weight[3] += 0.5
    return module

def other_vocabulary():
    return Small(38)
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Result:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse ends this way
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def fails(result: Result, *words: str) -> None:
    """One sentence on standard error, nothing on standard output, exit status 2."""
    status, out, err = result
    assert (status, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert sentence.startswith("pastkey "), err
    assert "Traceback" not in err
    for word in words:
        assert word in sentence


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(FACTORY)
    return file


@pytest.fixture(scope="session")
def trained(checkpoint: Path) -> Path:
    """The checkpoint's int8 bundle."""
    out = checkpoint.parent / "bundle"
    assert main(["export", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def small(factory: Path) -> Path:
    """The fp32 bundle of the factory's module."""
    out = factory.parent / "small"
    assert main(["export", f"{factory}:Small", "--context", "12", "--precision", "fp32", "--out", str(out)]) == 0
    return out


# --- export -------------------------------------------------------------------------------------------------------
def test_a_checkpoint_becomes_a_bundle_that_speaks(trained: Path, checkpoint: Path) -> None:
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


def test_json_is_one_object_whatever_the_module_prints(factory: Path, tmp_path: Path, command: Command) -> None:
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


def test_without_json_nothing_is_on_standard_output(factory: Path, tmp_path: Path, command: Command) -> None:
    arguments = ("export", f"{factory}:Small", "--context", 12, "--out", tmp_path / "bundle")
    status, printed, told = command(*arguments)
    assert (status, printed) == (0, "")
    assert "observe the attention calls of Small" in told
    assert "float32 against torch, 12 tokens: equal" in told
    assert "int8 against itself, 12 tokens: equal" in told
    assert "KL divergence" in told
    assert f"next:  pastkey run {tmp_path / 'bundle'} --prompt-ids" in told
    # a second time, the folder is there
    before = (tmp_path / "bundle" / names.MANIFEST).stat().st_mtime_ns
    fails(command(*arguments), f"{tmp_path / 'bundle'} already exists", "--force")
    assert (tmp_path / "bundle" / names.MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{file}:Small",), ("Small has no context length of its own", "--context N")),
        (("{file}:Small", "--context", "1"), ("the context length is 1",)),
        (("{file}:Small", "--context", "0"), ("--context", "0 is not a whole number from 1")),
        (("{file}:Small", "--context", "many"), ("'many' is not a whole number",)),
        (("{file}:Small", "--context", "13"), ("fails at position 12, the last of a context of 13", "mine.py:")),
        (("{file}:Small", "--context", "12", "--precision", "int2"), ("invalid choice: 'int2'", "int8")),
        (("{file}:Small", "--context", "12", "--precision", "fp16"), ("invalid choice: 'fp16'", "int8", "fp32")),
        (("{file}:Small", "--context", "12", "--target", "tpu"), ("invalid choice: 'tpu'", "cpu")),
        (("{file}:Small", "--context", "12", "--target", "qnn"), ("invalid choice: 'qnn'", "cuda", "portable")),
        (
            ("{file}:Small", "--context", "12", "--target", "portable"),
            ("--target portable promises ONNX-standard operators only", "--precision fp32", "--graph standard"),
        ),
        (("{file}:Small", "--context", "12", "--graph", "best"), ("invalid choice: 'best'", "standard")),
        (("{file}:Small", "--context", "12", "--tokenizer", "{folder}/no.json"), ("no such tokenizer", "no.json")),
        (("{file}:Nothing", "--context", "12"), ("has no function 'Nothing'", "Small")),
        (("{file}", "--context", "12"), ("names a file without its factory",)),
        (("{folder}/none.py:make", "--context", "12"), ("no such file", "none.py")),
        (("{folder}/none",), ("no such source", "none does not exist")),
        (("{file}:NotCausal", "--context", "12"), ("is not causal", "is_causal=True", "mine.py:")),
        (("{file}:Baked", "--context", "12"), ("in the check 'prefill'", "position_ids", "layer 0")),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: tuple[str, ...], words: tuple[str, ...], factory: Path, tmp_path: Path, command: Command
) -> None:
    filled = [argument.format(file=factory, folder=factory.parent) for argument in arguments]
    fails(command("export", *filled, "--out", tmp_path / "bundle", "--json"), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "precision", "words"),
    [
        ("fma avx2", "int8", "on this processor int8 products take AVX2 kernels, for want of VNNI"),
        ("fma avx2", "fp32", None),
        ("fma avx2 avx_vnni", "int8", None),
        (None, "int8", None),
    ],
)
def test_a_processor_without_fast_kernels_is_one_warning(
    flags: str | None, precision: str, words: str | None,
    factory: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pastkey.runtime import processor

    found = processor.choose_int8_kernels("x86_64", None if flags is None else flags.split())
    monkeypatch.setattr(processor, "int8_kernels", lambda: found)
    choices = ("--context", 12, "--precision", precision, "--json")
    status, _, told = command("export", f"{factory}:Small", *choices, "--out", tmp_path / "bundle")
    assert status == 0
    warnings = [line for line in told.splitlines() if "warning" in line]
    assert len(warnings) == (words is not None)
    assert not words or words in warnings[0]


def test_an_out_is_needed(factory: Path, command: Command) -> None:
    fails(command("export", f"{factory}:Small"), "--out")


def test_force_replaces_what_pastkey_wrote_and_nothing_else(factory: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_text("")
    (tmp_path / "file").write_text("mine")
    for name in ("photos", "file"):
        arguments = ("export", f"{factory}:Small", "--context", 12, "--out", tmp_path / name, "--force")
        fails(command(*arguments), "pastkey did not write it", "choose another --out")
    assert (tmp_path / "photos" / "1.png").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_is_not_replaced_by_its_own_bundle(checkpoint: Path, tmp_path: Path, command: Command) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    fails(command("export", copy, "--out", f"{copy}/", "--force"), "is what is to be exported, and would be replaced")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_a_full_disk_is_one_sentence(
    factory: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_json", full)
    arguments = ("--context", 12, "--precision", "fp32", "--out", tmp_path / "bundle")
    fails(command("export", f"{factory}:Small", *arguments), "the disk is full", "nothing half-written was kept")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("force", [False, True])
def test_an_export_that_is_stopped_leaves_nothing_and_loses_nothing(
    number: signal.Signals, status: int, force: bool, small: Path, tmp_path: Path
) -> None:
    """Stopped while the bundle's first files are there: the module waits in the verification until the signal comes."""
    module = tmp_path / "waits.py"
    waiting = "class Waits(Small):\n    def forward(self, input_ids, position_ids):\n        import glob, time\n"
    waiting += "        while glob.glob('work/.bundle.*.partial'):\n            time.sleep(0.01)\n"
    module.write_text(FACTORY + waiting + "        return super().forward(input_ids, position_ids)\n")
    work = tmp_path / "work"
    work.mkdir()
    if force:
        shutil.copytree(small, work / "bundle")
    arguments = ["export", f"{module}:Waits", "--context", "12", "--out", "work/bundle", *["--force"] * force]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pastkey", *arguments],
        cwd=tmp_path,
        env=environment,
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


# --- verify -------------------------------------------------------------------------------------------------------
def test_verify_against_the_source_and_alone(small: Path, factory: Path, command: Command) -> None:
    status, out, err = command("verify", small, f"{factory}:Small")
    assert (status, out) == (0, "")
    assert f"{small} against source, 12 tokens: equal" in err
    status, out, err = command("verify", small)
    assert (status, out) == (0, "")
    assert f"{small} against own uncached run, 12 tokens: equal" in err


def test_verify_json_is_one_object_with_a_figure_per_check(small: Path, factory: Path, command: Command) -> None:
    status, printed, _ = command("verify", small, f"{factory}:Small", "--json")
    assert (status, printed.count("\n")) == (0, 1)
    result = json.loads(printed)
    assert (result["ok"], result["reference"]) == (True, "source")
    for name in ("prefill", "decode", "chunks_of_7", "chunks_of_64", "batch"):
        assert 0 <= result["checks"][name]["value"] <= 1e-5
    assert result["checks"]["greedy"] == {
        "ok": True, "measure": "first_difference", "value": None, "limit": None, "detail": "",
    }  # fmt: skip


def test_verify_int8_measures_its_distance_from_the_source(trained: Path, checkpoint: Path, command: Command) -> None:
    status, printed, _ = command("verify", trained, checkpoint, "--json")
    result = json.loads(printed)
    assert status == 0
    assert 0 < result["kl_divergence"] < 0.05
    assert result["top1_agreement"] > 0.5


def test_altered_weights_with_a_matching_manifest_are_a_difference(
    small: Path, factory: Path, tmp_path: Path, command: Command
) -> None:
    altered = alter_weight(open_bundle(small), tmp_path, "qkv.weight", 3.0).path
    status, printed, _ = command("verify", altered, f"{factory}:Small", "--json")
    result = json.loads(printed)
    assert (status, printed.count("\n"), result["ok"]) == (1, 1, False)
    assert result["checks"]["prefill"]["ok"] is False
    assert result["checks"]["prefill"]["value"] > 1e-5
    assert "first in layer 0 (, mine.py:" in result["checks"]["prefill"]["detail"]
    status, printed, told = command("verify", altered, f"{factory}:Small")
    assert (status, printed) == (1, "")
    assert "DIFFERENT" in told
    assert "FAIL prefill" in told


def test_another_source_is_a_difference(small: Path, factory: Path, command: Command) -> None:
    status, printed, _ = command("verify", small, f"{factory}:other_weights", "--json")
    assert (status, json.loads(printed)["ok"]) == (1, False)


def test_a_source_of_another_shape_is_a_mistake(small: Path, factory: Path, checkpoint: Path, command: Command) -> None:
    fails(
        command("verify", small, f"{factory}:other_vocabulary"),
        "has 37 tokens",
        "Small has 38",
        "name the source that it was exported from",
    )
    fails(command("verify", small, checkpoint), "of 1 layers, 1 heads of size 16", "of 2 layers, 2 heads of size 16")


def test_a_hash_that_does_not_match_names_the_file(small: Path, tmp_path: Path, command: Command) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(small, altered)
    data = altered / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    fails(command("verify", altered, "--json"), "model.onnx_data was altered: its sha256 is", "copy it again")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "onnx/pastkey.onnx").unlink(), ("onnx/pastkey.onnx is missing",)),
        (lambda f: (f / "onnx/model.onnx_data").write_bytes(b"short"), ("model.onnx_data has 5 bytes", "truncated")),
        (lambda f: (f / names.MANIFEST).unlink(), ("is not a bundle: it has no pastkey.json",)),
        (
            lambda f: (f / names.MANIFEST).write_text(json.dumps({"kind": "bundle", "format_version": 2})),
            ("bundle format version 2; this pastkey reads up to 1: upgrade pastkey",),
        ),
    ],
    ids=["missing", "truncated", "no_manifest", "newer"],
)
def test_a_damaged_bundle_is_one_sentence(
    damage: Any, words: tuple[str, ...], small: Path, tmp_path: Path, command: Command
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    damage(copy)
    fails(command("verify", copy), *words)


def test_no_such_bundle(tmp_path: Path, command: Command) -> None:
    fails(command("verify", tmp_path / "none"), "no such bundle")
    fails(command("verify", tmp_path), "is not a bundle")
