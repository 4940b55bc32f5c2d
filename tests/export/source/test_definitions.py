"""Of a script or notebook just what an expression needs is run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.export.source.definitions import parse_request, run_definitions

from .opening import write_notebook

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


def refusal(file: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        ran(file, text)
    return str(caught.value)


def notebook(folder: Path, *cells: str) -> Path:
    return write_notebook(folder / "lesson.ipynb", *cells)


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
    sentence = refusal(script, "Model(size=4)")
    assert f"making it failed at {script}:8 with FileNotFoundError" in sentence
    assert "'vocab_size = ...; Model(size=4)'" in sentence
    assert f"step needs step, which the for block at {script}:50 makes" in refusal(script, "step")
    sentence = refusal(script, "no_such_package.Model()")
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
    assert words in refusal(script, text)


def test_a_later_definition_takes_the_place_of_an_earlier_one(tmp_path):
    file = notebook(tmp_path, "def make():\n    return 1", "first = make()", "def make():\n    return 2", "x = make()")
    assert ran(file, "first, x") == (1, 2)


def test_magics_are_left_out(tmp_path):
    file = notebook(
        tmp_path,
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
    file = notebook(tmp_path, "import math", "\nsize = math.sqrt('a')", "def make():\n    return size")
    assert f"make() needs size, and making it failed at {file}[2]:2 with TypeError" in refusal(file, "make()")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"cells": 3}', '{"cells": [{"cell_type": "code"}]}'])
def test_a_file_that_is_no_notebook_is_told(content, tmp_path):
    (tmp_path / "lesson.ipynb").write_text(content)
    assert "is not a notebook: JSON with a list of cells was expected" in refusal(tmp_path / "lesson.ipynb", "make")


def test_a_script_that_is_no_python_is_told_with_the_line(tmp_path):
    (tmp_path / "train.py").write_text("import math\ndef make(:\n")
    assert f"{tmp_path}/train.py:2 is not valid Python: " in refusal(tmp_path / "train.py", "make")


def test_a_star_import_may_make_any_name(tmp_path):
    (tmp_path / "train.py").write_text("from math import *\ndef make():\n    return floor(2.5)\n")
    assert ran(tmp_path / "train.py", "make()") == 2
