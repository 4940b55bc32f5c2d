"""examples/web/ on plain onnxruntime-web, in Node and as the page that it is: the tokens of Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import pastkey
from benchmarks.environments import install_chromium, node_environment
from pastkey.contract.bundle import open_bundle

from ..shared import divided
from .browser import visit

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
EXAMPLE = HERE.parent.parent / "examples" / "web"
PROMPTS, NEW_TOKENS = ([5, 7, 9], [3], [300, 268, 14, 307, 268, 26, 267]), 24
BUNDLES = ("llama", "llama-fp32", "llama-standard", "llama-standard-fp32", "gpt2", "short-conv", "gpt2-webgpu-fp16")

# A WebGPU for processors, which Chromium brings.
SWIFTSHADER = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")


def packages() -> Path:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    return node_environment(EXAMPLE / "package.json", "web")


def require_chromium() -> str:
    chromium = install_chromium()
    if chromium is None:
        pytest.skip("chromium is not installed, and only root can install Debian's package")
    return chromium


def in_node(bundle: Path, prompts: list[list[int]], new_tokens: int) -> subprocess.CompletedProcess[str]:
    folder = packages()
    for file in (EXAMPLE / "greedy.mjs", HERE / "web_example.mjs"):  # Node looks for packages beside the script
        shutil.copy(file, folder)
    command: list[str | Path] = ["node", folder / "web_example.mjs", bundle, str(new_tokens), json.dumps(prompts)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def answers(done: subprocess.CompletedProcess[str]) -> list[list[int]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["ids"] for line in done.stdout.splitlines()]


def expected(bundle: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    lm = pastkey.load(bundle, "cpu")
    return [lm.generate(prompt, max_new_tokens=new_tokens).ids for prompt in prompts]


@pytest.mark.parametrize("name", divided(BUNDLES, ci=("llama", "llama-standard-fp32", "short-conv")))
def test_node_gives_the_tokens_of_python(bundles: Callable[[str], Path], name: str) -> None:
    bundle = bundles(name)
    vocabulary = open_bundle(bundle).manifest.vocab_size
    prompts = [[token % vocabulary for token in prompt] for prompt in PROMPTS]
    found = answers(in_node(bundle, prompts, NEW_TOKENS))
    assert found == expected(bundle, prompts, NEW_TOKENS)
    assert sum(map(len, found)) >= 10  # they learned to end


def test_a_text_ends_where_the_context_does(bundles: Callable[[str], Path]) -> None:
    bundle = bundles("llama-standard-fp32")
    full = open_bundle(bundle).manifest.context_length
    prompts = [[3] * (full - 2), [3] * full]
    assert answers(in_node(bundle, prompts, 9)) == expected(bundle, prompts, 9)


def test_an_id_outside_the_vocabulary_is_refused(bundles: Callable[[str], Path]) -> None:
    done = in_node(bundles("llama"), [[5, 99999]], 1)
    assert done.returncode != 0
    assert "the prompt is 5,99999: give one token id or more, each from 0 to 319" in done.stderr


@pytest.mark.parametrize(
    ("name", "flags", "provider"),
    [("llama", (), "wasm"), ("llama-fp32", SWIFTSHADER, "wasm"), ("llama-standard-fp32", SWIFTSHADER, "webgpu")],
)
def test_the_page_gives_them_too(
    bundles: Callable[[str], Path], tmp_path: Path, name: str, flags: tuple[str, ...], provider: str
) -> None:
    """Without WebGPU, with it on a bundle that it computes wrong, and on one that it computes right."""
    modules, bundle, chromium = packages() / "node_modules", bundles(name), require_chromium()
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"newTokens": NEW_TOKENS, "prompts": PROMPTS}))
    places = {
        "/page.html": HERE / "web_example.html",
        "/request.json": request,
        "/web/node_modules": modules,
        "/web/bundle": bundle,
        "/web": EXAMPLE,
    }
    path, content = visit(chromium, "/page.html", places, flags=flags, seconds=300)
    assert path == "/answers", content
    assert content == {"ready": f"ready on {provider}", "answers": expected(bundle, [*PROMPTS], NEW_TOKENS)}


def test_continue_before_the_bundle_is_ready_does_not_load_the_page_anew() -> None:
    """It never is: no onnxruntime-web and no bundle are there."""
    places = {"/page.html": HERE / "web_example_early.html", "/web": EXAMPLE}
    path, content = visit(require_chromium(), "/page.html", places)
    assert (path, content) == ("/answers", {"disabled": True, "same": True, "address": ""})
