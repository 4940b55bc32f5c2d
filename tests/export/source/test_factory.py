"""file.py:factory, notebook.ipynb:expression: what is run, what is taken, and what is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.errors import InputError, MissingFileError, PastkeyError
from pastkey.export.source.open import open_source
from pastkey.export.source.source import Source

MODEL = """
import torch
from torch import nn
from neighbour import WIDTH

class Model(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, input_ids, position_ids):
        return input_ids[..., None].expand(-1, -1, WIDTH).float()

def make():
    return Model()

def number():
    return 7

def fails():
    values = []
    return values[3]

def leaves():
    raise SystemExit(3)

def needs(config, *rest, depth, name="a", **more):
    return Model()

def pair():
    return 3, Model()

def late():
    import neighbour
    return Model(neighbour.WIDTH)

constant = 5
instance = Model()
compiled = torch.compile(instance, backend="eager")
"""

TRAINING = """
import torch
from torch import nn
import sys

class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

model = Model(3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
for step in range(4):
    optimizer.zero_grad()
    (model.weight - 1).square().sum().backward()
    optimizer.step()
print("trained", sys.argv)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "mine.py").write_text(MODEL)
    return tmp_path / "mine.py"


@pytest.fixture
def training(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAINING)
    return tmp_path / "train.py"


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    cells = [{"cell_type": "code", "source": ["%matplotlib inline\n", *TRAINING.splitlines(keepends=True)]}]
    (tmp_path / "lesson.ipynb").write_text(json.dumps({"cells": cells}))
    return tmp_path / "lesson.ipynb"


def opened(source: str, **settings: Any) -> Source:
    return open_source(source, **({"context_length": 8} | settings))


def refusal(kind: type[PastkeyError], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        opened(*arguments, **settings)
    return str(caught.value)


def values(source: Source) -> list[float]:
    return [value for weight in source.module.parameters() for value in weight.tolist()]


# --- what is taken --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("make", 4), ("Model", 4), ("Model(width=3)", 3), ("Model(2 + 3)", 5), ("instance", 4), ("compiled", 4),
        ("late", 4), ("needs(1, depth=2)", 4), ("pair()[1]", 4), ("n = 6; Model(n)", 6), ("lambda: Model(2)", 2),
        ("{'a:b': Model(7)}['a:b']", 7),
    ],
)  # fmt: skip
def test_a_function_a_class_a_module_and_an_expression_give_the_module(text: str, width: int, file: Path) -> None:
    before = list(sys.path), list(sys.argv)
    source = opened(f"{file}:{text}")
    assert source.name == "Model"
    assert len(values(source)) == width
    assert (sys.path, sys.argv) == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("missing", "has no function 'missing'; it defines Model, make"),
        ("constant", "is a int"),
        ("", "write {file}:NAME"),
        ("number", "returned a int"),
        ("fails", "failed at {file}:22 with IndexError"),
        ("leaves", "failed at {file}:25 with SystemExit: 3"),
        ("needs", "give them as in  {file}:'needs(config=..., depth=...)'"),
        ("Model(depth=3)", "failed at {file} with TypeError: "),
        ("pair", "take it out of the tuple, as in"),
        ("Model(", "is not valid Python"),
    ],
)
def test_what_gives_no_module_is_told(text: str, sentence: str, file: Path) -> None:
    assert sentence.format(file=file) in refusal(InputError, f"{file}:{text}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("import torch\nimport no_such_package\n", "importing failed at {file}:2 with ModuleNotFoundError"),
        ("def make(:\n", "importing failed at {file} with SyntaxError"),
        ("raise SystemExit('usage: mine.py --data FILE')\n", "importing failed at {file}:1 with SystemExit: usage"),
    ],
)
def test_a_file_that_does_not_run_is_told_with_its_line(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(content)
    before = list(sys.path)
    assert sentence.format(file=file) in refusal(InputError, f"{file}:make")
    assert sys.path == before


@pytest.mark.parametrize("name", ["none.py", "none.ipynb"])
def test_a_missing_file_is_told(name: str, tmp_path: Path) -> None:
    sentence = refusal(MissingFileError, f"{tmp_path}/{name}:make")
    assert sentence == f"no such file: {tmp_path}/{name}; expected path/to/file.py:factory"


# --- training -------------------------------------------------------------------------------------------------------
def test_a_script_that_trains_is_run_and_told_of(training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = opened(f"{training}:model")
    assert values(source) != [0, 0, 0]
    (sentence,) = source.warnings
    assert sentence.startswith(f"{training} trained while it was imported (4 steps of an optimizer)")
    assert "--weights FILE" in sentence
    assert capsys.readouterr().out == f"trained ['{training}']\n"


def test_a_factory_that_trains_when_called_gives_no_warning(tmp_path: Path) -> None:
    file = tmp_path / "lesson.py"
    file.write_text(
        "import torch\n\n"
        "def trained():\n"
        "    model = torch.nn.Embedding(2, 3)\n"
        "    optimizer = torch.optim.SGD(model.parameters())\n"
        "    model(torch.tensor([0])).sum().backward()\n"
        "    optimizer.step()\n"
        "    return model\n"
    )
    assert not opened(f"{file}:trained").warnings


def test_with_weights_no_training_is_run(training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"_orig_mod.weight": torch.full((3,), 5.0)}}, tmp_path / "state.pt")
    for text in ("model", "Model(3)", "width = 3; Model(width)"):
        told: list[str] = []
        source = opened(f"{training}:{text}", weights=tmp_path / "state.pt", say=told.append)
        assert values(source) == [5, 5, 5]
        assert "without '_orig_mod.' in their names" in " ".join(source.warnings)
        assert "is a pickle" in " ".join(told)
    assert capsys.readouterr().out == ""


def test_a_notebook_is_not_run_and_says_so_where_no_weights_follow(notebook: Path, tmp_path: Path) -> None:
    source = opened(f"{notebook}:model")
    assert values(source) == [0, 0, 0]
    assert source.warnings[0].startswith(f"of {notebook} only what model needs was run, and no training")
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    source = opened(f"{notebook}:Model(3)", weights=tmp_path / "state.pt")
    assert values(source) == [1, 1, 1]
    assert not any("no training" in sentence for sentence in source.warnings)
