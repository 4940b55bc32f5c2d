"""The layout and the import table of docs/design.md, read off every file."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pastkey", "train", "export", "runtime")


@dataclass(frozen=True)
class Rule:
    """What a folder may import: `ours` across folders, `anywhere` at any place, `inside` only in functions."""

    ours: frozenset[str]
    anywhere: frozenset[str]
    inside: frozenset[str] = frozenset()


RULES = {
    "pastkey": Rule(frozenset({"pastkey"}), frozenset()),
    "runtime": Rule(
        frozenset({"pastkey"}), frozenset({"numpy", "onnxruntime", "tokenizers"}), frozenset({"tqdm", "jinja2"})
    ),
    "train": Rule(
        frozenset({"pastkey"}), frozenset({"torch", "tokenizers", "safetensors", "numpy", "matplotlib", "tqdm"})
    ),
    "export": Rule(
        frozenset({"pastkey", "pastkey.train", "pastkey.runtime"}),
        frozenset(
            {
                "torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime",
                "safetensors", "tokenizers", "numpy", "matplotlib", "tqdm",
            }
        ),
        frozenset({"transformers", "gguf", "optimum"}),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    module: str  # "pastkey.runtime.session", "numpy"
    relative: int  # dots
    lazy: bool  # inside a function or TYPE_CHECKING
    line: int


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = True
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, 0, lazy, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if base == "pastkey":  # `from pastkey import names`, or a stage
                    for alias in child.names:
                        yield Import(f"pastkey.{alias.name}", child.level, lazy, child.lineno)
                else:
                    yield Import(base, child.level, lazy, child.lineno)
            else:
                yield from visit(child, inner)

    return visit(tree, False)


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_is_in_the_table(folder: str) -> None:
    rule = RULES[folder]
    assert source_files(folder)
    for file in source_files(folder):
        for found in imports(file):
            where = f"{file.relative_to(ROOT)}:{found.line} imports {found.module}"
            if found.relative:
                assert found.relative == 1, f"{where} with {found.relative} dots: across folders use pastkey.x"
                continue
            top = found.module.partition(".")[0]
            if top == "pastkey":
                stage = next((s for s in ("train", "export", "runtime") if found.module.split(".")[1:2] == [s]), None)
                owner = "pastkey" if stage is None else f"pastkey.{stage}"
                allowed = owner in rule.ours or (folder == "pastkey" and found.lazy)
                assert allowed, f"{where}, which {folder} may not"
            elif top not in sys.stdlib_module_names:
                allowed = top in rule.anywhere or (top in rule.inside and found.lazy)
                assert allowed, f"{where}, which {folder} may not{'' if top not in rule.inside else ' at top level'}"


def test_inside_a_folder_imports_are_relative() -> None:
    for folder in ("train", "export", "runtime"):
        for file in source_files(folder):
            for found in imports(file):
                assert not found.module.startswith(f"pastkey.{folder}"), f"{file}:{found.line} names its own folder"


def test_every_package_is_listed_and_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {"pastkey"} | {
        f"pastkey.{init.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for folder in ("train", "export", "runtime")
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {f"pastkey.{s}": s for s in ("train", "export", "runtime")}
    assert (ROOT / "pastkey" / "py.typed").is_file()


def test_no_file_of_the_package_has_grown_past_a_glance() -> None:
    for folder in FOLDERS:
        for file in source_files(folder):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            assert lines <= 450, f"{file.relative_to(ROOT)} has {lines} lines: split it by noun"


def test_the_runtime_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, pastkey.runtime.bench, pastkey.runtime.dialogue, pastkey.runtime.placement\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'transformers', 'matplotlib', 'tqdm', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    """The variable is set although the environment says otherwise, and by the time the module body runs."""
    code = (
        "import os, sys, importlib.abc\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n"
        "class Spy(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'onnxruntime': print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Spy())\n"
        "import pastkey.runtime.session\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_onnxruntime_is_imported_in_one_place() -> None:
    places = {
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in source_files(folder)
        for found in imports(file)
        if found.module.partition(".")[0] == "onnxruntime"
    }
    assert places == {"runtime/ort.py"}
