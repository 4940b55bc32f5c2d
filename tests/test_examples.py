"""Every example is short and does what its docstring says: the commands in it are run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from pastkey.__main__ import main

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
REFUSED = "attention_by_hand.py:by_hand"


def commands(file: Path) -> list[str]:
    """What the docstring says to type after `pastkey`."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.findall(r"^pastkey (export .*)$", docstring, re.MULTILINE)


# That of own_module.py is in the README too, and run by its tests.
EXPORTS = [command for file in EXAMPLES if file.name != "own_module.py" for command in commands(file)]


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
    assert sources == {"nano_gpt.py:make", "own_rope.py:make", "attention_by_hand.py:changed", REFUSED}


@pytest.mark.parametrize("command", [c for c in EXPORTS if REFUSED not in c], ids=lambda command: command.split()[1])
def test_an_example_exports_verifies_and_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, source, *_, bundle = command.split()
    assert main(command.split()) == 0
    capsys.readouterr()
    assert main(["verify", bundle, source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["run", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", "8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 8


def test_attention_by_hand_is_refused_with_its_line_and_the_change(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = next(command for command in EXPORTS if REFUSED in command)
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    sentence = err.splitlines()[-1]

    lines = (ROOT / "examples" / "attention_by_hand.py").read_text(encoding="utf-8").splitlines()
    softmax = next(number for number, line in enumerate(lines, 1) if ".softmax(" in line)
    assert f"attentions.0 of Decoder (attention_by_hand.py:{softmax}) computes attention by hand" in sentence
    before, after = sentence.split("change the three lines")[1].split("to the one")
    assert [line.strip().partition(" ")[0] for line in before.split(";")] == ["scores", "scores", "y"]
    assert after.strip() == "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)"
    assert [path.name for path in folder.iterdir()] == ["examples"]


def test_the_changed_attention_computes_what_the_one_by_hand_does() -> None:
    spec = importlib.util.spec_from_file_location("attention_by_hand", ROOT / "examples" / "attention_by_hand.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(example.changed()(ids, ids), example.by_hand()(ids, ids), rtol=1e-5, atol=1e-5)
