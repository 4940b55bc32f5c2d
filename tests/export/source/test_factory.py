"""Of a script or notebook just what an expression needs is run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pastkey.errors import InputError, MissingFileError
from pastkey.export.source.definitions import parse_request, run_definitions
from pastkey.export.source.factory import call_factory
from pastkey.export.source.source import Source

from .opening import opened, refusal, write_notebook

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

class Model:
    scale = math.sqrt(4.0)

    def __init__(self, size=3):
        self.made = helper(size)

    def vocabulary(self):
        return vocab_size

class Small:
    def __init__(self, size=3):
        self.made = helper(size)

for step in range(10):
    raise SystemError("training")
raise SystemError("training")
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def ran(file: Path, text: str) -> Any:
    import sys

    module = ModuleType("ran_by_a_test")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module
    request = parse_request(text, file)
    run_definitions(file, request, module)
    return eval(compile(request.expression, "<test>", "eval"), vars(module))


def unmade(file: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        ran(file, text)
    return str(caught.value)


def test_what_is_needed_is_run_in_its_order_and_nothing_else(script):
    config, number, fast = ran(script, "Small().made")
    assert (config.width, number, fast) == (3, 6, None)
    assert ran(script, "Config().width") == 6
    assert ran(script, "device") == "cpu"


def test_a_value_may_be_given_in_the_place_of_the_files_own(script):
    assert ran(script, "vocab_size = 65; Model().vocabulary()") == 65
    assert ran(script, "width = 8; Config().width") == 8
    assert ran(script, "size = Config(7).width; helper(size)")[1] == 10


def test_what_cannot_be_made_is_told_with_the_value_to_give(script):
    sentence = unmade(script, "Model(size=4)")
    assert f"making it failed at {script}:8 with FileNotFoundError" in sentence
    assert "'vocab_size = ...; Model(size=4)'" in sentence
    assert f"step needs step, which the for block at {script}:50 makes" in unmade(script, "step")
    sentence = unmade(script, "no_such_package.Model()")
    assert f"making it failed at {script}:5 with ModuleNotFoundError" in sentence
    assert "give its value" not in sentence


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is not valid Python") for text in ("Model(", "Model(\0)")),
        *((text, "does not end in an expression") for text in ("a = 1", "import os; Model()", "print(1); Model()")),
    ],
)
def test_a_request_is_assignments_and_an_expression(text, words, script):
    assert words in unmade(script, text)


def test_a_later_definition_takes_the_place_of_an_earlier_one(tmp_path):
    cells = "def make():\n    return 1", "first = make()", "def make():\n    return 2", "x = make()"
    file = write_notebook(tmp_path / "lesson.ipynb", *cells)
    assert ran(file, "first, x") == (1, 2)


def test_magics_are_left_out(tmp_path):
    file = write_notebook(
        tmp_path / "lesson.ipynb",
        "%pip install something\n!ls -l\nfiles = !ls\nimport math\nmath?\n?math\n",
        "%%time\nwidth = 6\nfor i in range(3):\n    raise SystemError\n",
        "%%bash\nls | grep x\n",
        "if width > 3:\n    %matplotlib inline\n    !pip install x\n    depth = 2\n",
        "rest = (7\n% 4)\n",
        "half a thought (",
        "def make():\n    return width, math.floor(2.5), depth, rest\n",
        "t = %time make()\nprint(make())\nraise SystemError\n",
    )
    assert ran(file, "make()") == (6, 2, 2, 3)


def test_an_error_of_a_notebook_names_cell_and_line(tmp_path):
    file = write_notebook(
        tmp_path / "lesson.ipynb", "import math", "\nsize = math.sqrt('a')", "def make():\n    return size"
    )
    assert f"make() needs size, and making it failed at {file}[2]:2 with TypeError" in unmade(file, "make()")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}'])
def test_a_file_that_is_no_notebook_is_told(content, tmp_path):
    (tmp_path / "lesson.ipynb").write_text(content)
    assert "is not a notebook: JSON with a list of cells was expected" in unmade(tmp_path / "lesson.ipynb", "make")


def test_a_script_that_is_no_python_is_told_with_the_line(tmp_path):
    (tmp_path / "train.py").write_text("import math\ndef make(:\n")
    assert f"{tmp_path}/train.py:2 is not valid Python: " in unmade(tmp_path / "train.py", "make")


def test_a_star_import_may_make_any_name(tmp_path):
    (tmp_path / "train.py").write_text("from math import *\ndef make():\n    return floor(2.5)\n")
    assert ran(tmp_path / "train.py", "make()") == 2


# --- file.py:factory, notebook.ipynb:expression: what is run, what is taken, and what is told ----------------------
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
def file(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "mine.py").write_text(MODEL)
    return tmp_path / "mine.py"


@pytest.fixture
def training(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    return tmp_path / "train.py"


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "lesson.ipynb", "%matplotlib inline\n" + TRAINING)


def values(source: Source) -> list[float]:
    return [value for weight in source.module.parameters() for value in weight.tolist()]


def test_what_the_file_sets_for_its_process_is_restored(file, tmp_path):
    file.write_text("import os\nos.chdir('/')\ntorch_default = __import__('torch').set_default_dtype\n" + MODEL)
    file.write_text(file.read_text() + "\ntorch_default(torch.bfloat16)\n")
    before = Path.cwd()
    opened(f"{file}:make")
    assert (Path.cwd(), torch.get_default_dtype()) == (before, torch.float32)


# --- what is taken --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("make", 4), ("Model", 4), ("Model(width=3)", 3), ("Model(2 + 3)", 5), ("instance", 4), ("compiled", 4),
        ("late", 4), ("needs(1, depth=2)", 4), ("pair()[1]", 4), ("n = 6; Model(n)", 6), ("lambda: Model(2)", 2),
        ("{'a:b': Model(7)}['a:b']", 7),
    ],
)  # fmt: skip
def test_a_function_a_class_a_module_and_an_expression_give_the_module(text, width, file):
    before = list(sys.path), list(sys.argv)
    source = opened(f"{file}:{text}")
    assert source.name == "Model"
    assert len(values(source)) == width
    assert (sys.path, sys.argv) == before


# the factory of `file`, or of a file with this content
REFUSED: dict[str, tuple[str, str]] = {
    "missing": (MODEL, "has no function 'missing'; it defines Model, make"),
    "constant": (MODEL, "is a int"),
    "": (MODEL, "write {file}:NAME"),
    "number": (MODEL, "returned a int"),
    "fails": (MODEL, "failed at {file}:22 with IndexError"),
    "leaves": (MODEL, "failed at {file}:25 with SystemExit: 3"),
    "needs": (MODEL, "give them as in  {file}:'needs(config=..., depth=...)'"),
    "Model(depth=3)": (MODEL, "failed at {file} with TypeError: "),
    "pair": (MODEL, "take it out of the tuple, as in"),
    "Model(": (MODEL, "is not valid Python"),
    "in_a_lack": ("import torch\nimport no_such_package\n", "importing failed at {file}:2 with ModuleNotFoundError"),
    "in_no_python": ("def make(:\n", "{file}:1 is not valid Python"),
    "in_a_program": ("raise SystemExit('usage: FILE')\n", "importing failed at {file}:1 with SystemExit: usage"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_gives_no_module_is_told_with_its_line(text, file):
    content, sentence = REFUSED[text]
    file.write_text(content)
    before = list(sys.path)
    assert sentence.format(file=file) in refusal(InputError, f"{file}:{text}")
    assert sys.path == before


@pytest.mark.parametrize("name", ["none.py", "none.ipynb"])
def test_a_missing_file_is_told(name, tmp_path):
    sentence = refusal(MissingFileError, f"{tmp_path}/{name}:make")
    assert sentence == f"no such file: {tmp_path}/{name}; expected path/to/file.py:factory"


# --- training -------------------------------------------------------------------------------------------------------
def test_a_script_that_trains_is_run_and_told_of(training, capsys):
    source = opened(f"{training}:model")
    assert values(source) != [0, 0, 0]
    (sentence,) = source.warnings
    assert sentence.startswith(f"{training} trained while it was imported (4 steps of an optimizer)")
    assert "--weights FILE" in sentence
    assert capsys.readouterr().out == f"trained ['{training}']\n"


def test_a_factory_that_trains_when_called_gives_no_warning(training):
    lines = TRAINING.partition("model = ")
    body = "".join(f"    {line}\n" for line in (lines[1] + lines[2]).splitlines())
    training.write_text(f"{lines[0]}\ndef trained():\n{body}    return model\n")
    module, warnings = call_factory(training, "trained")
    assert next(module.parameters()).tolist() != [0, 0, 0]
    assert warnings == ()


def test_with_weights_no_training_is_run(training, tmp_path, capsys):
    torch.save({"model": {"_orig_mod.weight": torch.full((3,), 5.0)}}, tmp_path / "state.pt")
    for text in ("model", "Model(3)", "width = 3; Model(width)"):
        told: list[str] = []
        source = opened(f"{training}:{text}", weights=tmp_path / "state.pt", say=told.append)
        assert values(source) == [5, 5, 5]
        assert "without '_orig_mod.' in their names" in " ".join(source.warnings)
        assert "is a pickle" in " ".join(told)
    assert capsys.readouterr().out == ""


def test_a_notebook_is_not_run_and_says_so_where_no_weights_follow(notebook, tmp_path):
    source = opened(f"{notebook}:model")
    assert values(source) == [0, 0, 0]
    assert source.warnings[0].startswith(f"of {notebook} only what model needs was run, and no training")
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    source = opened(f"{notebook}:Model(3)", weights=tmp_path / "state.pt")
    assert values(source) == [1, 1, 1]
    assert not any("no training" in sentence for sentence in source.warnings)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("torch.save(model.state_dict(), 'my model.pt')", "with --weights 'my model.pt', which cell [2] saves"),
        ("save_file(model.state_dict(), name)", "with --weights FILE, which cell [2] saves"),
        ("torch.save({'model': model.state_dict(), 'step': 3}, 'a.pt')", "with --weights a.pt, which cell [2] saves"),
        ("torch.save(losses, 'losses.pt')", "with --weights FILE"),
    ],
)
def test_a_notebook_says_which_cell_saves_its_weights(line, told, notebook):
    write_notebook(notebook, TRAINING, line)
    assert opened(f"{notebook}:model").warnings[0].endswith(told)


# --- packages -------------------------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path, request, monkeypatch):
    """A package in the working folder, which no module of another test is part of."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    folder = tmp_path / "lm_of_mine" / "nets"
    folder.mkdir(parents=True)
    (tmp_path / "top.py").write_text("WIDTH = 4\n")
    (folder.parent / "sizes.py").write_text("WIDTH = 4\n")
    (folder / "model.py").write_text(MODEL.replace("from neighbour", "from ..sizes"))
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
        (package.parent / "__init__.py").write_text("print('imported')\n")
    named = named.format(path=tmp_path)
    path = list(sys.path)
    assert values(opened(f"{named}:make")) == [0.0] * 4
    assert values(opened(f"{named}:Model(3)")) == [0.0] * 3
    assert sys.path == path
    torch.save({"weight": torch.ones(4)}, tmp_path / "weights.pt")
    assert values(opened(f"{named}:Model()", weights=tmp_path / "weights.pt")) == [1.0] * 4


def test_a_module_is_found_in_the_working_folder_and_may_import_from_there(package, tmp_path):
    (package / "model.py").write_text(MODEL.replace("from neighbour", "from top"))
    (package / "__init__.py").write_text("raise SystemError")  # which a file without relative imports does not run
    assert values(opened("lm_of_mine/nets/model.py:make")) == [0.0] * 4
    (package / "__init__.py").write_text("from .model import make\n")
    assert values(opened("lm_of_mine.nets:make")) == [0.0] * 4


def test_a_package_that_does_something_when_it_is_imported_is_told(package):
    start = package / "__init__.py"
    for line, told in (
        ("import sys; sys.exit(3)", "with SystemExit: 3, which ends Python: put what a program does under  if __name"),
        ("raise KeyError('no data')", "with KeyError: 'no data'"),
        ("import of_nobody", "with ModuleNotFoundError: No module named 'of_nobody'"),
    ):
        start.write_text(line)
        message = refusal(InputError, f"{package / 'model.py'}:make")
        assert message.startswith(f"importing the package lm_of_mine.nets failed at {start}:1 ")
        assert told in message


def test_a_package_of_a_name_that_is_taken_is_told(package, tmp_path):
    taken = tmp_path / "json"
    taken.mkdir()
    (taken / "__init__.py").touch()
    (taken / "model.py").write_text("from . import sizes\nmake = 3")
    assert "Python already has another one of this name" in refusal(InputError, f"{taken / 'model.py'}:make")


def test_a_module_that_is_not_there_is_told(package):
    for named, lacking in (("lm_of_mine.net.model", "lm_of_mine.net"), ("of_nobody", "of_nobody")):
        assert f"no module {named}: {lacking} is in neither" in refusal(MissingFileError, f"{named}:make")
    assert "math is not a Python file" in refusal(InputError, "math:make")
