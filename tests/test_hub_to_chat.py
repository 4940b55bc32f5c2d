"""From a model's id on a Hub to an answer, in one command, as a user types it. The Hub is on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

for package in ("transformers", "huggingface_hub", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

from pastkey.contract import names
from pastkey.files.folder import read_json

from .export.tiny_llama import TEMPLATE, bpe, llama
from .loopback_hub import serving, without_hub

pytestmark = pytest.mark.slow

NAME = "org/tiny-chat"
Done = subprocess.CompletedProcess[str]
Typed = Callable[..., Done]


@pytest.fixture(scope="module")
def hub():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def model(made_once):
    def make(folder: Path) -> None:
        llama().save_pretrained(folder)
        tokenizer = bpe(bos=True)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)

    return made_once("hub-model", make)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def typed(hub, home):
    """Runs a command of a user whose home is empty at first."""

    def run(*arguments: object, stdin: str = "", **variables: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "pastkey", *map(str, arguments)],
            cwd=home,
            env=without_hub() | hub.environment(home) | variables,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def first(hub, model, typed):
    """The first answer, for which the model is fetched and exported."""
    hub.add(NAME, model)
    done = typed("chat", NAME, "--prompt", "Hello", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    return done


def bundle_of(home: Path) -> Path:
    return home / "cache" / "pastkey" / "bundles" / NAME.replace("/", "--")


def test_one_command_answers(first, hub, home):
    assert first.stderr.splitlines()[0] == f"fetching {NAME} from {hub.address.removeprefix('http://')}"
    assert first.stdout.count("\n") == 1
    assert "next:  pastkey chat" in first.stderr
    manifest = read_json(bundle_of(home) / names.MANIFEST)
    assert manifest["revision"] == hub.repositories[NAME].sha()
    assert manifest["source"] == NAME
    assert [path.name for path in bundle_of(home).parent.iterdir() if path.name.startswith(".")] == []


def test_from_then_on_nothing_is_fetched_nor_exported(first, hub, typed):
    hub.asked.clear()
    hub.repositories[NAME].commits.append({})
    again = typed("chat", NAME, "--max-new-tokens", "5", stdin="Hello\n")
    hub.repositories[NAME].commits.pop()
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    ran = typed("run", NAME, "--prompt", "Hello", "--json", "--max-new-tokens", "5")
    assert json.loads(ran.stdout)["new_tokens"] == 5
    assert hub.asked == []


def test_a_bundle_is_compared_with_its_source_in_the_cache(first, hub, typed, home):
    """At the commit that was exported; verify fetches nothing."""
    hub.asked.clear()
    done = typed("verify", bundle_of(home), NAME, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    missing = typed("verify", bundle_of(home), "org/other")
    assert missing.returncode == 2
    assert "has no model org/other, and only `pastkey export` fetches" in missing.stderr
    assert hub.asked == []


def test_a_bundle_on_the_hub_is_taken_as_it_is(first, hub, typed, home):
    hub.add("org/bundle", bundle_of(home))
    for flags in ((), ("--untrusted",)):  # the second time it is here
        done = typed("chat", "org/bundle", "--prompt", "Hello", "--max-new-tokens", "5", *flags)
        assert (done.returncode, done.stdout) == (0, first.stdout), done.stderr
    taken = bundle_of(home).with_name("org--bundle")
    assert (taken / names.MANIFEST).read_bytes() == (bundle_of(home) / names.MANIFEST).read_bytes()
    refused = typed("export", "org/bundle", "--out", home / "other", "--precision", "int4")
    assert refused.returncode == 2
    assert "org/bundle is a bundle already, and taken as it is: leave out the option precision" in refused.stderr


def test_a_bundle_that_was_altered_on_the_hub(first, hub, typed, home):
    altered = hub.add("org/altered", bundle_of(home)).commits[0]
    altered[names.TOKENIZER] = altered[names.TOKENIZER].replace(b"a", b"b", 1)
    done = typed("export", "org/altered", "--out", home / "altered")
    assert (done.returncode, done.stdout) == (2, "")
    assert "was altered" in done.stderr
    assert not (home / "altered").exists()


@pytest.mark.matrix
def test_without_network_an_export_takes_what_the_cache_has(first, hub, typed, home):
    hub.asked.clear()
    refused = typed("export", "org/new", "--out", home / "new", "--no-network")
    assert refused.returncode == 2
    assert "no path org/new exists" in refused.stderr
    offline = typed("chat", "org/new", "--prompt", "Hello", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (2, "")
    assert "fetch it with  pastkey export org/new --out new" in offline.stderr
    assert hub.asked == []
    done = typed("export", NAME, "--out", home / "again", "--no-network", "--precision", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == hub.repositories[NAME].sha()
    assert hub.asked == []


@pytest.mark.matrix
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_leaves_nothing(hub, model, tmp_path):
    """While the weights are fetched."""
    hub.add("org/interrupted", model)
    process = subprocess.Popen(
        [sys.executable, "-m", "pastkey", "chat", "org/interrupted", "--prompt", "Hello"],
        env=without_hub() | hub.environment(tmp_path),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def interrupt(asked: str) -> None:
        if "/blobs/" in asked:
            process.send_signal(signal.SIGINT)
            time.sleep(5)

    hub.before = interrupt
    try:
        out, err = process.communicate(timeout=120)
    finally:
        hub.before = lambda asked: None
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "pastkey chat: interrupted"
    assert "Traceback" not in err
    bundles = tmp_path / "cache" / "pastkey" / "bundles"
    assert [path.name for path in bundles.iterdir()] == ["org--interrupted.lock"]
    left = [file for _, _, files in os.walk(tmp_path) for file in files]
    assert names.CONFIG in left
    assert [file for file in left if file.endswith((".incomplete", ".safetensors"))] == []
