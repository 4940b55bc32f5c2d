"""Every example is short and does what its docstring says: the commands in it are run."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pastkey.__main__ import main

from .runtime import conftest as decoder
from .runtime.constraints import vocabularies

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def commands(file: Path) -> list[str]:
    """What the docstring says to type after `pastkey`."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.findall(r"^pastkey (export .*)$", docstring, re.MULTILINE)


EXPORTS = [command for file in EXAMPLES for command in commands(file)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are typed: examples/ is there, and what they write is not in the checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < 100


def test_the_examples_cover_what_people_write() -> None:
    sources = {command.split()[1].removeprefix("examples/") for command in EXPORTS}
    assert sources == {"lesson.py:trained", "nano_gpt.py:make", "own_module.py:make", "own_rope.py:make"}


@pytest.mark.parametrize("command", [c for c in EXPORTS if "lesson" not in c], ids=lambda command: command.split()[1])
def test_an_example_exports_verifies_and_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, source, *_, bundle = command.split()
    assert main(command.split()) == 0
    capsys.readouterr()
    assert main(["verify", bundle, source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["run", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", "8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 8


def test_the_lesson_trains_exports_itself_and_answers(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/lesson.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "the owl does\n"
    manifest = json.loads((folder / "lesson" / "pastkey.json").read_text(encoding="utf-8"))
    assert (manifest["graph"], manifest["precision"]) == ("fused", "int8")


def test_what_is_extracted_is_an_instance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a decoder of random weights, whose every answer is JSON all the same."""
    pytest.importorskip("llguidance")
    tokenizer = vocabularies.byte_level()
    monkeypatch.setattr(decoder, "V", tokenizer.get_vocab_size())
    tiny = decoder.Tiny.random([(8, 8)], context_length=900)
    bundle = decoder.write_bundle(tmp_path / "b", tiny, "fused", tokenizer=tokenizer)
    monkeypatch.setattr(sys, "argv", ["extract.py", str(bundle.path), "Anna from Berlin wants 日 apples."])
    made = runpy.run_path(str(ROOT / "examples" / "extract.py"), run_name="__main__")
    told = capsys.readouterr().out
    order = eval(told.rpartition(" (")[0], {"Order": made["Order"], "Item": made["Item"]})
    assert isinstance(order, made["Order"])
    assert all(isinstance(item.name, str) and 0 <= item.count <= 999 for item in order.items)
    assert order.delivery in ("post", "courier", "unknown")
    assert told.endswith("tokens were certain)\n")
