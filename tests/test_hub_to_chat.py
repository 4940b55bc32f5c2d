"""From a model's id on a Hub to an answer, in one command, as a user types it. The Hub is on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
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
PASTKEY = (sys.executable, "-m", "pastkey")
Done = subprocess.CompletedProcess[str]


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
    """Runs a command of a user whose home is empty at first, up to this exit status."""

    def run(*arguments: object, stdin: str = "", status: int = 0, **variables: str) -> Done:
        command, given = [*PASTKEY, *map(str, arguments)], without_hub() | hub.environment(home) | variables
        done = subprocess.run(command, cwd=home, env=given, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert status == 0 or done.stdout == ""
        return done

    return run


@pytest.fixture(scope="module")
def first(hub, model, typed):
    """The first answer, for which the model is fetched and exported."""
    hub.add(NAME, model)
    return typed("chat", NAME, "--prompt", "Hello", "--max-new-tokens", "5")


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
    assert (again.stdout, again.stderr) == (first.stdout, "")
    ran = typed("run", NAME, "--prompt", "Hello", "--json", "--max-new-tokens", "5")
    assert json.loads(ran.stdout)["new_tokens"] == 5
    assert hub.asked == []


def test_a_bundle_is_compared_with_its_source_in_the_cache(first, hub, typed, home):
    """At the commit that was exported; verify fetches nothing."""
    hub.asked.clear()
    assert json.loads(typed("verify", bundle_of(home), NAME, "--json").stdout)["ok"] is True
    missing = typed("verify", bundle_of(home), "org/other", status=2)
    assert "has no model org/other, and only `pastkey export` fetches" in missing.stderr
    assert hub.asked == []


def test_a_bundle_on_the_hub_is_taken_as_it_is_unless_it_was_altered(first, hub, typed, home):
    hub.add("org/bundle", bundle_of(home))
    for flags in ((), ("--untrusted",)):  # the second time it is here
        done = typed("chat", "org/bundle", "--prompt", "Hello", "--max-new-tokens", "5", *flags)
        assert done.stdout == first.stdout
    taken = bundle_of(home).with_name("org--bundle")
    assert (taken / names.MANIFEST).read_bytes() == (bundle_of(home) / names.MANIFEST).read_bytes()
    refused = typed("export", "org/bundle", "--out", home / "other", "--precision", "int4", status=2)
    assert "org/bundle is a bundle already, and is run unchanged: leave out the option precision" in refused.stderr
    altered = hub.add("org/altered", bundle_of(home)).commits[0]
    altered[names.TOKENIZER] = altered[names.TOKENIZER].replace(b"a", b"b", 1)
    assert "was altered" in typed("export", "org/altered", "--out", home / "altered", status=2).stderr
    assert not (home / "altered").exists()


@pytest.mark.matrix
def test_without_network_an_export_takes_what_the_cache_has(first, hub, typed, home):
    hub.asked.clear()
    refused = typed("export", "org/new", "--out", home / "new", "--no-network", status=2)
    assert "no path org/new exists" in refused.stderr
    offline = typed("chat", "org/new", "--prompt", "Hello", status=2, HF_HUB_OFFLINE="1")
    assert "fetch it with  pastkey export org/new --out new" in offline.stderr
    assert hub.asked == []
    done = typed("export", NAME, "--out", home / "again", "--no-network", "--precision", "fp32", "--json")
    assert json.loads(done.stdout)["revision"] == hub.repositories[NAME].sha()
    assert hub.asked == []
