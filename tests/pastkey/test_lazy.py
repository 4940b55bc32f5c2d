"""The names of the four packages: those that type checkers read, and nothing loaded before it is used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pastkey
from pastkey.errors import MissingExtraError
from pastkey.lazy import lazy_names

PACKAGES = {"pastkey": "", "pastkey.runtime": "", "pastkey.train": "torch", "pastkey.export": "torch"}


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_names_that_there_are(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = [alias.asname for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(map(str, seen)) == module.__all__
    assert set(module.__all__) <= set(dir(module))
    assert [name for name in dir(module) if not name.startswith("__")] == [n for n in module.__all__ if n[0] != "_"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_loads(package):
    if PACKAGES[package]:
        pytest.importorskip(PACKAGES[package])
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_module_is_reached_through_its_package():
    assert {"Completion", "LanguageModel", "errors", "load", "__version__"} <= set(dir(pastkey))
    told = run("import pastkey; print(pastkey.errors.InputError.__name__, pastkey.train.stories.stories.__name__)")
    assert told == "InputError stories\n"


def test_importing_loads_no_stage_and_nothing_heavy():
    heavy = "{'numpy', 'torch', 'onnxruntime', 'importlib.metadata', 'pastkey.runtime'}"
    assert run(f"import sys, pastkey; print(sorted({heavy} & set(sys.modules)))") == "[]\n"
    stages = "pastkey.train, pastkey.export, pastkey.runtime"
    assert run(f"import sys, {stages}; print(sorted(({heavy} - {{'pastkey.runtime'}}) & set(sys.modules)))") == "[]\n"


@pytest.mark.parametrize(
    ("stage", "name", "package"),
    [("train", "Decoder", "torch"), ("export", "export", "torch"), ("runtime", "load", "onnxruntime")],
)
def test_a_missing_package_is_told_in_a_sentence_by_every_stage(stage, name, package):
    program = (
        f"import sys\nsys.modules[{package!r}] = None\nfrom pastkey.errors import MissingExtraError\n"
        f"try:\n    from pastkey.{stage} import {name}\nexcept MissingExtraError as error:\n    print(error)"
    )
    assert f"the package {package!r} is not installed" in run(program)


def test_a_missing_module_of_ours_is_no_missing_extra():
    _, get, _ = lazy_names("pastkey", {".nowhere": ["name"]})
    with pytest.raises(ModuleNotFoundError, match="nowhere") as raised:
        get("name")
    assert not isinstance(raised.value, MissingExtraError)
