"""Of a script or notebook just what an expression needs is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.errors import InputError, MissingFileError
from pastkey.export.source import factory
from pastkey.export.source.source import Source

from .opening import opened, refusal, write, write_notebook

SCRIPT = """
from __future__ import annotations

import math
import no_such_package
from dataclasses import dataclass, field

with open("no_such_file.txt") as f:
    text = f.read()
    print(len(text))
chars = sorted(set(text))
vocab_size = len(chars)
width = 2
width *= 3
device = "cpu"
if math.pi > 4:
    device = "cuda"
try:
    import no_such_package as fast
except ImportError:
    fast = None
with open(__file__) as f:
    own = f.read()
    raise_if_called = undefined_name
half, rest = divmod(width, 2)

@dataclass
class Config:
    width: int = width
    later: Later | None = None
    parts: list[int] = field(default_factory=list)

def helper(size):
    text = "a name of its own"
    return Config(size), size + half, fast

class Small:
    def __init__(self, size=3):
        self.made = helper(size)

def vocabulary():
    return vocab_size

for step in range(10):
    raise SystemError("training")
raise SystemError("training")
"""


@pytest.fixture
def script(tmp_path):
    return write(tmp_path / "train.py", SCRIPT)


def evaluate(file: Path, text: str) -> Any:
    """The value of the text, of any kind, where only definitions are run."""
    return factory.make(file, text, definitions_only=True, is_wanted=lambda value: True, expected="anything")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(lambda made: (made[0].width, made[1], made[2]))(Small().made)", (3, 6, None)), ("Config().width", 6),
        ("device", "cpu"),
        # a given value replaces the file's own
        ("vocab_size = 65; vocabulary()", 65), ("width = 8; Config().width", 8),
        ("size = Config(7).width; helper(size)[1]", 10),
    ],
)  # fmt: skip
def test_what_is_needed_is_run_in_its_order_and_nothing_else(text, value, script):
    assert evaluate(script, text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vocabulary()", "making it failed at {script}:8 with FileNotFoundError"),
        ("vocabulary()", "'vocab_size = ...; vocabulary()'"),
        ("step", "step needs step, which the for block at {script}:44 makes"),
        ("no_such_package.Model()", "making it failed at {script}:5 with ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_made_is_told_with_the_value_to_give(text, words, script):
    with pytest.raises(InputError) as caught:
        evaluate(script, text)
    assert words.format(script=script) in str(caught.value)
    assert ("give its value" in str(caught.value)) == ("package" not in text)


def test_cells_are_run_in_their_order_and_magics_are_left_out(tmp_path):
    file = write_notebook(
        tmp_path / "lesson.ipynb",
        "%pip install something\n!ls -l\nfiles = !ls\nimport math\nmath?\n?math\n",
        "%%time\nwidth = 6\nfor i in range(3):\n    raise SystemError\n",
        "%%bash\nls | grep x\n",
        "if width > 3:\n    %matplotlib inline\n    !pip install x\n    depth = 2\n",
        "rest = (7\n% 4)\n",
        "half a thought (",
        "def make():\n    return 1",
        "first = make()",
        "def make():\n    return width, math.floor(2.5), depth, rest\n",
        "t = %time make()\nprint(make())\nraise SystemError\n",
        "size = math.sqrt('a')",
    )
    assert evaluate(file, "first, make()") == (1, (6, 2, 2, 3))
    with pytest.raises(InputError, match=r"size needs size, and making it failed at .*ipynb\[11\]:1 with TypeError"):
        evaluate(file, "size")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}'])
def test_a_file_that_is_no_notebook_is_told(content, tmp_path):
    with pytest.raises(InputError, match="is not a notebook"):
        evaluate(write(tmp_path / "lesson.ipynb", content), "make")


def test_a_star_import_may_make_any_name(tmp_path):
    file = write(tmp_path / "train.py", "from math import *\ndef make():\n    return floor(2.5)\n")
    assert evaluate(file, "make()") == 2


# --- file.py:factory, notebook.ipynb:expression: what is run, what is used, and what is told -----------------------
MODEL = """
import torch
from torch import nn
from neighbour import WIDTH

class Model(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

def make():
    return Model()

def fails():
    return [][3]

def needs(config, *rest, depth, name="a", **more):
    return Model()

def late():
    import neighbour
    return Model(neighbour.WIDTH)
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
def file(tmp_path):
    write(tmp_path / "neighbour.py", "WIDTH = 4\n")
    return write(tmp_path / "mine.py", MODEL)


@pytest.fixture
def training(tmp_path):
    return write(tmp_path / "train.py", TRAINING)


def values(source: Source) -> list[float]:
    return [value for weight in source.module.parameters() for value in weight.tolist()]


def test_what_the_file_sets_for_its_process_is_restored(file):
    write(file, f"import os\nos.chdir('/')\n{MODEL}\ntorch.set_default_dtype(torch.bfloat16)\n")
    before = Path.cwd()
    opened(f"{file}:make")
    assert (Path.cwd(), torch.get_default_dtype()) == (before, torch.float32)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("make", 4), ("Model", 4), ("Model(width=3)", 3), ("Model(2 + 3)", 5), ("late", 4),
        ("torch.compile(Model(), backend='eager')", 4), ("needs(1, depth=2)", 4), ("(3, Model())[1]", 4),
        ("n = 6; Model(n)", 6), ("lambda: Model(2)", 2), ("{'a:b': Model(7)}['a:b']", 7),
    ],
)  # fmt: skip
def test_a_function_a_class_a_module_and_an_expression_give_the_module(text, width, file):
    before = list(sys.path), list(sys.argv)
    source = opened(f"{file}:{text}")
    assert (source.name, len(values(source))) == ("Model", width)
    assert (sys.path, sys.argv) == before


# the factory of `file`, or of a file with this content
REFUSED: dict[str, tuple[str, str]] = {
    "missing": (MODEL, "has no function 'missing'; it defines Model, make"),
    "5": (MODEL, "is a int"),
    "": (MODEL, "write {file}:NAME"),
    "lambda: 7": (MODEL, "returned a int"),
    "fails": (MODEL, "failed at {file}:15 with IndexError"),
    "exit(3)": (MODEL, "failed at {file} with SystemExit: 3"),
    "needs": (MODEL, "give them as in  {file}:'needs(config=..., depth=...)'"),
    "Model(depth=3)": (MODEL, "failed at {file} with TypeError: "),
    "(3, Model())": (MODEL, "choose it from the tuple, as in  {file}:'(3, Model())[1]'"),
    "in_a_lack": ("import torch\nimport no_such_package\n", "importing failed at {file}:2 with ModuleNotFoundError"),
    "in_no_python": ("def make(:\n", "{file}:1 is not valid Python"),
    "in_a_program": ("raise SystemExit('usage: FILE')\n", "importing failed at {file}:1 with SystemExit: usage"),
    **dict.fromkeys(("Model(", "Model(\x00)"), (MODEL, "is not valid Python")),
    **dict.fromkeys(("a = 1", "import os; Model()", "print(1); Model()"), (MODEL, "does not end in an expression")),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_gives_no_module_is_told_with_its_line(text, file):
    content, sentence = REFUSED[text]
    write(file, content)
    before = list(sys.path)
    assert sentence.format(file=file) in refusal(InputError, f"{file}:{text}")
    assert sys.path == before


# --- training -------------------------------------------------------------------------------------------------------
def test_a_script_that_trains_is_run(training, capsys):
    source = opened(f"{training}:model")
    assert values(source) != [0, 0, 0]
    assert capsys.readouterr().out == f"trained ['{training}']\n"


def test_with_weights_no_training_is_run(training, tmp_path, capsys):
    torch.save({"model": {"_orig_mod.weight": torch.full((3,), 5.0)}}, tmp_path / "state.pt")
    for text in ("model", "Model(3)", "width = 3; Model(width)"):
        assert values(opened(f"{training}:{text}", weights=tmp_path / "state.pt")) == [5, 5, 5]
    assert capsys.readouterr().out == ""


def test_a_notebook_is_not_run_and_says_so_where_no_weights_follow(tmp_path):
    notebook = write_notebook(tmp_path / "lesson.ipynb", "%matplotlib inline\n" + TRAINING)
    source = opened(f"{notebook}:model")
    assert values(source) == [0, 0, 0]
    assert source.warnings[0].endswith("these are as they were initialized; give the trained ones with --weights FILE")
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    source = opened(f"{notebook}:Model(3)", weights=tmp_path / "state.pt")
    assert values(source) == [1, 1, 1]
    assert not any("no training" in sentence for sentence in source.warnings)


# --- packages -------------------------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the working folder, which no module of another test is part of."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    folder = tmp_path / "lm_of_mine" / "nets"
    folder.mkdir(parents=True)
    write(tmp_path / "top.py", "WIDTH = 4\n")
    write(folder.parent / "sizes.py", "WIDTH = 4\n")
    write(folder / "model.py", MODEL.replace("from neighbour", "from ..sizes"))
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("lm_of_mine", "top"):
            del sys.modules[name]


@pytest.mark.parametrize("marked", [True, False], ids=["with __init__.py", "without"])
@pytest.mark.parametrize(
    "named", ["lm_of_mine/nets/model.py", "{path}/lm_of_mine/nets/model.py", "lm_of_mine.nets.model"]
)
def test_a_file_of_a_package_imports_its_neighbours(named, marked, package, tmp_path):
    if marked:
        (package / "__init__.py").touch()
        write(package.parent / "__init__.py", "print('imported')\n")
    named = named.format(path=tmp_path)
    path = list(sys.path)
    assert values(opened(f"{named}:make")) == [0.0] * 4
    assert values(opened(f"{named}:Model(3)")) == [0.0] * 3
    assert sys.path == path
    torch.save({"weight": torch.ones(4)}, tmp_path / "weights.pt")
    assert values(opened(f"{named}:Model()", weights=tmp_path / "weights.pt")) == [1.0] * 4


def test_a_module_is_found_in_the_working_folder_and_may_import_from_there(package):
    write(package / "model.py", MODEL.replace("from neighbour", "from top"))
    write(package / "__init__.py", "raise SystemError")  # which a file without relative imports does not run
    assert values(opened("lm_of_mine/nets/model.py:make")) == [0.0] * 4
    write(package / "__init__.py", "from .model import make\n")
    assert values(opened("lm_of_mine.nets:make")) == [0.0] * 4


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import sys; sys.exit(3)", "with SystemExit: 3, which ends Python: put the code of a program under"),
        ("raise KeyError('no data')", "with KeyError: 'no data'"),
    ],
)
def test_a_package_that_does_something_when_it_is_imported_is_told(line, told, package):
    start = write(package / "__init__.py", line)
    message = refusal(InputError, f"{package / 'model.py'}:make")
    assert message.startswith(f"importing the package lm_of_mine.nets failed at {start}:1 {told}")


def test_a_package_of_a_name_that_is_taken_is_told(package, tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").touch()
    file = write(tmp_path / "json" / "model.py", "from . import sizes\nmake = 3")
    assert "Python already has another one of this name" in refusal(InputError, f"{file}:make")


def test_a_file_and_a_module_that_are_not_there_are_told(package):
    assert "no such file" in refusal(MissingFileError, "none.py:make")
    for named, lacking in (("lm_of_mine.net.model", "lm_of_mine.net"), ("of_nobody", "of_nobody")):
        assert f"no module {named}: {lacking} is in neither" in refusal(MissingFileError, f"{named}:make")
    assert "math is not a Python file" in refusal(InputError, "math:make")
