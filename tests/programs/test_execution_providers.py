"""Wheels of onnxruntime for other hardware, each in an environment of its own: the CPU's tokens, or one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import pastkey
from benchmarks.environments import OPENVINO, QNN, ROOT, WEBGPU, environment, install_lavapipe

pytestmark = pytest.mark.slow

PROMPT, NEW_TOKENS = "Zoë had 37", 24
HTP = ("backend_type=htp", "htp_arch=75", "soc_model=57")


def pastkey_in(wheel: tuple[str, list[str]], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command of this checkout by the Python of an environment."""
    own = os.environ | {"PYTHONPATH": str(ROOT), "ORT_DISABLE_TELEMETRY": "1"}
    if wheel is WEBGPU:
        driver = install_lavapipe()
        if driver is None:
            pytest.skip("there is no Vulkan driver, and none can be installed")
        own |= {"VK_DRIVER_FILES": str(driver)}
    command = [environment(*wheel), "-m", "pastkey", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=own, timeout=300)


def answered(done: subprocess.CompletedProcess[str]) -> list[int]:
    """The ids of `run --json`: nothing else is on standard output."""
    assert done.returncode == 0, done.stderr
    ids: list[int] = json.loads(done.stdout)["ids"]
    return ids


def run(wheel: tuple[str, list[str]], bundle: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    new = str(NEW_TOKENS)
    return pastkey_in(wheel, "run", bundle, "--prompt", PROMPT, "--max-new-tokens", new, "--json", *flags)


def expected(bundle: Path) -> list[int]:
    return pastkey.load(bundle).generate(PROMPT, max_new_tokens=NEW_TOKENS).ids


def available(wheel: tuple[str, list[str]]) -> Mapping[str, bool]:
    done = pastkey_in(wheel, "devices", "--json")
    assert done.returncode == 0, done.stderr
    return {row["short_name"]: row["available"] for row in json.loads(done.stdout)["devices"]}


@pytest.mark.parametrize("name", ["llama-standard", "llama-standard-fp32"])
def test_openvino_runs_the_standard_graph_whole(bundles: Callable[[str], Path], name: str) -> None:
    bundle = bundles(name)
    done = run(OPENVINO, bundle, "--provider", "openvino", "--provider-option", "device_type=CPU")
    assert answered(done) == expected(bundle)
    assert "leaves" not in done.stderr
    placed = pastkey_in(OPENVINO, "inspect", bundle, "--provider", "openvino", "--json")
    assert [(s["provider"], s["nodes"], s["parts"]) for s in json.loads(placed.stdout)["shares"]] == [
        ("openvino", 1, 1)
    ]


def test_openvino_leaves_the_attention_of_the_fused_graph(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("llama-fp32")
    refused = run(OPENVINO, bundle, "--provider", "openvino")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert (
        "leaves 2 operators (GroupQueryAttention 2) in 2 parts of this bundle's graph to the processor"
        in refused.stderr
    )
    allowed = run(OPENVINO, bundle, "--provider", "openvino", "--allow-fallback")
    assert answered(allowed) == expected(bundle)
    assert "'openvino' leaves 2 operators (GroupQueryAttention 2) in 2 parts to the processor" in allowed.stderr


def test_parts_are_those_of_onnxruntimes_own_profile(bundles: Callable[[str], Path]) -> None:
    """Each compiled part is one event of a run, and each attention stands alone between two of them."""
    placed = pastkey_in(
        OPENVINO, "inspect", bundles("llama-fp32"), "--provider", "openvino", "--allow-fallback", "--json"
    )
    shares = {share["provider"]: share for share in json.loads(placed.stdout)["shares"]}
    assert shares["cpu"]["operators"] == {"GroupQueryAttention": 2}
    assert (shares["cpu"]["parts"], shares["openvino"]["parts"]) == (2, shares["openvino"]["nodes"])
    assert shares["openvino"]["nodes"] == sum(shares["openvino"]["operators"].values()) >= 3


def test_devices_names_wheels_and_devices() -> None:
    for wheel, name, package, device in (
        (OPENVINO, "openvino", "onnxruntime-openvino ", "CPU"),
        (QNN, "qnn", "onnxruntime-qnn ", "CPU of "),  # without an NPU it emulates one on the processor
    ):
        rows = {row["short_name"]: row for row in json.loads(pastkey_in(wheel, "devices", "--json").stdout)["devices"]}
        assert rows[name]["package"].startswith(package)
        assert any(found.startswith(device) for found in rows[name]["devices"])
        assert "onnxruntime-webgpu" in rows["webgpu"]["note"]


def test_openvino_without_its_device_is_one_sentence(bundles: Callable[[str], Path]) -> None:
    done = run(OPENVINO, bundles("llama-standard"), "--provider", "openvino", "--provider-option", "device_type=NPU")
    assert (done.returncode, done.stdout) == (2, "")
    assert "could not start the execution provider 'openvino'" in done.stderr


def test_webgpu_runs_the_standard_graph_and_says_what_it_leaves(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("llama-standard-fp32")
    done = run(WEBGPU, bundle, "--provider", "webgpu")
    assert answered(done) == expected(bundle)
    assert re.search(r"the execution provider 'webgpu' leaves \d+ operators \(.*\) in \d+ parts to ", done.stderr)


def test_qnn_is_found_and_takes_no_sizes_that_change(bundles: Callable[[str], Path]) -> None:
    assert available(QNN)["qnn"]
    options = [part for option in HTP for part in ("--provider-option", option)]
    done = run(QNN, bundles("llama-standard-fp32"), "--provider", "qnn", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the execution provider 'qnn' cannot load" in done.stderr
    assert "Dynamic shape is not supported" in done.stderr
