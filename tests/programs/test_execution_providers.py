"""Wheels of onnxruntime for other hardware, each in a separate environment: the CPU's tokens, or one sentence."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pastkey
from benchmarks.environments import environment
from pastkey.contract.bundle import open_bundle
from pastkey.export.measure.texts import self_generated_texts
from pastkey.runtime.engine.engine import Engine

from ..shared import divided, ran
from .environments import OPENVINO, QNN, WEBGPU, environment_of

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

PROMPT, NEW_TOKENS = "Zoë had 37", 24
HTP = ("backend_type=htp", "htp_arch=75", "soc_model=57")


Wheel = tuple[str, list[str]]
Done = subprocess.CompletedProcess[str]


def pastkey_in(wheel: Wheel, *arguments: str | Path, home: Path | None = None, status: int = 0) -> Done:
    """The command of this checkout by the Python of an environment; `home` is its cache folder."""
    own = environment_of(wheel) | ({} if home is None else {"XDG_CACHE_HOME": str(home)})
    command = [environment(*wheel), "-m", "pastkey", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    assert status == 0 or done.stdout == ""
    return done


def answered(done: Done) -> list[int]:
    """The ids of `run --json`: nothing else is on standard output."""
    ids: list[int] = json.loads(done.stdout)["ids"]
    return ids


def run(wheel: Wheel, bundle: Path, flags: str = "", **how: Any) -> Done:
    new = ("--max-new-tokens", str(NEW_TOKENS), "--json")
    return pastkey_in(wheel, "run", bundle, "--prompt", PROMPT, *new, *flags.split(), **how)


def expected(bundle: Path) -> list[int]:
    return pastkey.load(bundle, "cpu").generate(PROMPT, max_new_tokens=NEW_TOKENS).ids


@pytest.mark.parametrize("name", divided(["llama-standard", "llama-standard-fp32"], ci=["llama-standard"]))
def test_openvino_runs_the_standard_graph_whole(bundles, name):
    bundle = bundles(name)
    done = run(OPENVINO, bundle, "--provider openvino --provider-option device_type=CPU")
    assert answered(done) == expected(bundle)
    assert "leaves" not in done.stderr
    placed = pastkey_in(OPENVINO, "inspect", bundle, "--provider", "openvino", "--json")
    answer = json.loads(placed.stdout)
    (share,) = answer["shares"]
    assert share["provider"] == "openvino"


def test_openvino_leaves_the_attention_of_the_fused_graph(bundles):
    bundle = bundles("llama-fp32")
    refused = run(OPENVINO, bundle, "--provider openvino", status=2)
    assert "--target openvino, or use the provider 'cpu'; allow_fallback=True" in refused.stderr
    allowed = run(OPENVINO, bundle, "--provider openvino --allow-fallback")
    assert answered(allowed) == expected(bundle)
    assert "'openvino' leaves 2 operators (GroupQueryAttention 2) to the CPU" in allowed.stderr


def test_devices_names_wheels_and_devices():
    for wheel, name, package, device in (
        (OPENVINO, "openvino", "onnxruntime-openvino ", "CPU"),
        (QNN, "qnn", "onnxruntime-qnn ", "CPU of "),  # without an NPU it emulates one on the CPU
    ):
        rows = {row["short_name"]: row for row in json.loads(pastkey_in(wheel, "devices", "--json").stdout)["devices"]}
        assert rows[name]["package"].startswith(package)
        assert rows[name]["available"]
        assert any(found.startswith(device) for found in rows[name]["devices"])
        assert "onnxruntime-webgpu" in rows["webgpu"]["note"]


@pytest.mark.parametrize(
    "name",
    divided(["llama-webgpu", "gpt2-webgpu-fp16", "llama-webgpu-int8"], ci=["gpt2-webgpu-fp16", "llama-webgpu-int8"]),
)
def test_webgpu_runs_its_own_graph_whole(bundles, tmp_path, name):
    bundle = bundles(name)
    done = run(WEBGPU, bundle, home=tmp_path)  # where it was made for
    assert answered(done) == expected(bundle)
    assert "leaves" not in done.stderr
    # Debian's lavapipe prefills wrong, beyond a few tokens: that is found, and told at each load.
    assert "computes a prefill wrong on this device, or too inexactly to tell, and single" in done.stderr
    again = run(WEBGPU, bundle, home=tmp_path)
    assert answered(again) == expected(bundle)
    assert "single tokens right" in again.stderr
    placed = pastkey_in(WEBGPU, "inspect", bundle, "--json")
    assert [share["provider"] for share in json.loads(placed.stdout)["shares"]] == ["webgpu"]
    assert "Traceback" not in placed.stderr


def test_webgpu_runs_the_static_graph_whole_and_prefills_right(bundles, tmp_path):
    bundle = bundles("llama-webgpu-static")
    done = run(WEBGPU, bundle, "--provider webgpu", home=tmp_path)
    assert answered(done) == expected(bundle)
    assert ("leaves" in done.stderr, "single tokens" in done.stderr) == (False, False)


def test_webgpu_runs_what_was_made_for_it_and_names_what_stays_on_the_cpu(bundles, tmp_path):
    bundle = bundles("soft-cap-webgpu-int8")
    for flags in ((), ("--provider", "webgpu")):
        options = ("--prompt-ids", "5,9,2", "--max-new-tokens", str(NEW_TOKENS), "--json", *flags)
        done = pastkey_in(WEBGPU, "run", bundle, *options, home=tmp_path)
        assert answered(done) == pastkey.load(bundle, "cpu").generate([5, 9, 2], max_new_tokens=NEW_TOKENS).ids
        assert re.search(r"the execution provider 'webgpu' leaves \d+ operators \(.*\) to ", done.stderr)


def test_webgpu_measures_and_verifies_and_ends_without_a_crash(bundles, tmp_path):
    numbers = ("--prompt-tokens", "20", "--new-tokens", "8", "--json")
    for name in ("llama-webgpu", "llama-webgpu-static"):
        benched = pastkey_in(WEBGPU, "bench", bundles(name), *numbers, home=tmp_path)
        assert json.loads(benched.stdout)["decode_tokens_per_second"] > 0
    pastkey_in(WEBGPU, "inspect", bundles("llama-webgpu-static"), "--json", home=tmp_path)
    bundle = bundles("llama-webgpu")
    pastkey_in(WEBGPU, "verify", bundle, "--provider", "webgpu", "--json", home=tmp_path)
    asked = pastkey_in(WEBGPU, "run", bundle, "--prompt-ids", "1,9999", "--json", home=tmp_path, status=2)
    assert "token id 9999 is out of range" in asked.stderr


def test_qnn_takes_no_sizes_that_change(bundles):
    options = " ".join(f"--provider-option {option}" for option in HTP)
    done = run(QNN, bundles("llama-standard-fp32"), f"--provider qnn {options}", status=2)
    assert "the execution provider 'qnn' cannot load" in done.stderr
    assert "Dynamic shape is not supported" in done.stderr
    assert "export the model again with --target qnn, or use the provider 'cpu'" in done.stderr


# A trained decoder can continue the first two; a module without a tokenizer accepts ids.
PROMPTS = {"--prompt": (PROMPT, "Tom had 2 red", "Anna"), "--prompt-ids": ("1,2,3", "40,7,91,3,22,9,50,5", "77")}
ON_HTP = ["own-qnn", "qwen2-qnn", "gemma2-qnn"]


@pytest.mark.parametrize("name", divided([*ON_HTP, "llama-qnn", "gpt2-qnn", "qwen3-qnn"], ci=ON_HTP))
def test_static_graphs_run_whole_on_the_emulated_htp(bundles, name):
    """The target and nothing else says where: an operator that stays behind would be refused."""
    bundle = bundles(name)
    flag = "--prompt" if name in ("llama-qnn", "gpt2-qnn") else "--prompt-ids"
    float32 = pastkey.load(bundle, "cpu")
    for prompt in PROMPTS[flag]:
        done = pastkey_in(QNN, "run", bundle, flag, prompt, "--max-new-tokens", str(NEW_TOKENS), "--json")
        ids = [int(i) for i in prompt.split(",")] if flag == "--prompt-ids" else prompt
        assert answered(done) == float32.generate(ids, max_new_tokens=NEW_TOKENS).ids
        assert "leaves" not in done.stderr


def test_a_compiled_bundle_gives_the_same_tokens_and_is_of_its_chip(bundles, tmp_path):
    bundle, compiled = bundles("llama-qnn"), tmp_path / "compiled"
    done = pastkey_in(QNN, "compile", bundle, "--provider", "qnn", "--out", compiled, home=tmp_path)
    assert done.stdout == ""
    assert "compiled for qnn (backend_type=htp, htp_arch=75, soc_model=57)" in done.stderr
    ran = run(QNN, compiled, home=tmp_path)
    assert answered(ran) == expected(bundle)
    assert "leaves" not in ran.stderr
    shares = json.loads(pastkey_in(QNN, "inspect", compiled, "--json", home=tmp_path).stdout)["shares"]
    assert "qnn" in {share["provider"] for share in shares}
    other = run(QNN, compiled, "--provider qnn --provider-option htp_arch=73", status=2)
    assert "was compiled for qnn (" in other.stderr
    assert "htp_arch=73 was asked for" in other.stderr
    damaged = next((compiled / "onnx").glob("pastkey_decode*.bin"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert "was altered: its sha256 is" in run(QNN, compiled, status=2).stderr


def test_int8_on_the_emulated_htp_predicts_what_float32_predicts(bundles):
    """The result of a processor for the same graph says little: this is measured where it runs."""
    exact = Engine(open_bundle(bundles("llama-qnn")), providers="cpu", graph="all_logits")
    texts = self_generated_texts(exact, 0, 8, 63, batch=1)
    likeliest = []
    for text in texts:
        exact.reset()
        likeliest.append(exact.forward(text[None])[0, :-1].argmax(-1))
    program, ids = Path(__file__).with_name("teacher_forced.py"), json.dumps([text.tolist() for text in texts])
    done = ran(environment(*QNN), program, bundles("llama-qnn-int8"), ids, env=environment_of(QNN), timeout=300)
    agreed = np.array(json.loads(done.stdout)) == np.array(likeliest)
    print(f"int8 on the emulated HTP: {agreed.mean():.1%} of {agreed.size} steps agree with float32")
    assert agreed.size > 490
    assert agreed.mean() >= 0.95


def test_a_chip_that_does_not_exist_is_one_sentence(bundles):
    for option, words in (
        ("htp_arch=99", "'qnn' has no htp_arch 99; it must be one of 69, 73, 75"),
        ("soc_model=9999", "the execution provider 'qnn' cannot load"),
    ):
        done = run(QNN, bundles("llama-qnn"), f"--provider qnn --provider-option {option}", status=2)
        assert words in done.stderr
