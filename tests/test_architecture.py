"""The layout and the import table of docs/design.md, read off every file."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("train", "export", "runtime", "serve", "web", "see")
FOLDERS = ("pastkey", *STAGES)


@dataclass(frozen=True)
class Rule:
    """What a folder may import: `ours` across folders, `anywhere` at any place, `inside` only in functions."""

    ours: frozenset[str]
    anywhere: frozenset[str]
    inside: frozenset[str] = frozenset()


RULES = {
    "pastkey": Rule(frozenset({"pastkey"}), frozenset()),
    "runtime": Rule(
        frozenset({"pastkey"}),
        frozenset({"numpy", "onnxruntime", "tokenizers"}),
        frozenset({"jinja2", "llguidance", "cryptography"}),
    ),
    "serve": Rule(
        frozenset({"pastkey", "pastkey.runtime"}),
        frozenset(
            {
                "starlette", "uvicorn", "h11", "pydantic", "pydantic_core", "typing_extensions", "prometheus_client",
                "numpy",
            }
        ),
    ),
    "train": Rule(
        frozenset({"pastkey"}),
        frozenset({"torch", "tokenizers", "safetensors", "numpy", "matplotlib", "tqdm"}),
        frozenset({"transformers", "peft", "pyarrow"}),
    ),
    "export": Rule(
        frozenset({"pastkey", "pastkey.train", "pastkey.runtime"}),
        frozenset(
            {
                "torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime",
                "safetensors", "tokenizers", "numpy", "tqdm",
            }
        ),
        frozenset({"transformers", "peft", "gguf", "huggingface_hub", "onnxruntime_extensions"}),
    ),
    "web": Rule(frozenset({"pastkey", "pastkey.runtime"}), frozenset()),
    "see": Rule(
        frozenset({"pastkey", "pastkey.export", "pastkey.runtime"}), frozenset({"numpy", "onnx_ir"})
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    module: str  # "pastkey.runtime.engine.engine", "numpy"
    relative: int  # dots
    lazy: bool  # inside a function or TYPE_CHECKING
    line: int
    never: bool = False  # inside TYPE_CHECKING: for annotations, no program runs it


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def visit(node: ast.AST, lazy: bool, never: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            typing = never or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            inner = lazy or typing or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, 0, lazy, child.lineno, never)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if base == "pastkey" or not base:  # `from pastkey import names`, or a stage; `from . import facts`
                    for alias in child.names:
                        yield Import(".".join(filter(None, (base, alias.name))), child.level, lazy, child.lineno, never)
                else:
                    yield Import(base, child.level, lazy, child.lineno, never)
            else:
                yield from visit(child, inner, typing)

    return visit(tree, False, False)


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_is_in_the_table(folder):
    rule = RULES[folder]
    assert source_files(folder)
    for file in source_files(folder):
        for found in imports(file):
            where = f"{file.relative_to(ROOT)}:{found.line} imports {found.module}"
            if found.relative:
                depth = len(file.relative_to(ROOT / folder).parts)
                assert found.relative <= depth, f"{where} with {found.relative} dots: across folders use pastkey.x"
                continue
            top = found.module.partition(".")[0]
            if top == "pastkey":
                stage = next((s for s in STAGES if found.module.split(".")[1:2] == [s]), None)
                owner = "pastkey" if stage is None else f"pastkey.{stage}"
                allowed = owner in rule.ours or (folder == "pastkey" and found.lazy)
                assert allowed, f"{where}, which {folder} may not"
            elif top not in sys.stdlib_module_names:
                allowed = top in rule.anywhere or (top in rule.inside and found.lazy)
                assert allowed, f"{where}, which {folder} may not{'' if top not in rule.inside else ' at top level'}"


# The rooms of export/, from the bottom up: each may import those before it. Two stand beside them.
ROOMS = ("graph", "graft", "source", "measure", "quantize")
ROOM_RULES = {room: frozenset(ROOMS[: number + 1]) for number, room in enumerate(ROOMS)} | {
    "generation": frozenset({"generation", "graph", "source"}),
    "compat": frozenset({"compat", "source"}),
}
LEAVES = frozenset({"settings", "resources", "progress", "compare"})  # free to all


def target_of(file: Path, found: Import) -> tuple[str, ...]:
    """What a relative import names, as parts below its stage: ("graph", "edit")."""
    folder = file.relative_to(ROOT).parts[1:-1]
    kept = folder[: len(folder) - (found.relative - 1)]
    return (*kept, *(part for part in found.module.split(".") if part))


def test_the_rooms_of_export_are_in_order():
    assert {path.parent.name for path in (ROOT / "export").glob("*/__init__.py")} == set(ROOM_RULES)
    crossings = 0
    for room, allowed in ROOM_RULES.items():
        for file in source_files(f"export/{room}"):
            for found in imports(file):
                if not found.relative:
                    continue
                first = target_of(file, found)[0] if target_of(file, found) else ""
                crossings += first not in (room, "")
                where = f"{file.relative_to(ROOT)}:{found.line} imports {first}"
                assert first in allowed | LEAVES, f"{where}, which {room}/ may not: {', '.join(sorted(allowed))}"
    assert crossings > 20  # the walk finds them at all


# The floors of runtime/, and of pastkey/ beside the stages, from the bottom up. A room or file imports those below its
# own floor, at import or later, and for annotations too.
RUNTIME_FLOORS = (
    "options",
    "settings",
    "text sampling providers",
    "constraints engine",
    "speculation",
    "decoding",
    "model",
    "loading",
    "async_loading bulk sandbox",
    "commands",
)
PASTKEY_FLOORS = (
    "version errors",
    "lazy values precisions providers quiet",
    "typed",
    "files",
    "contract",
    "command",
    "exported",
    "__main__",
)
MOST_TYPING_IMPORTS = 13  # of our own modules in runtime/, beside its lazy names


@pytest.mark.parametrize(("folder", "floors"), [("runtime", RUNTIME_FLOORS), ("pastkey", PASTKEY_FLOORS)])
def test_no_import_runs_up(folder, floors):
    floor = {name: number for number, names in enumerate(floors) for name in names.split()}
    found = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == floor.keys()
    crossings = 0
    for file in source_files(folder):
        room = file.relative_to(ROOT / folder).parts[0].removesuffix(".py")
        for one in imports(file) if room != "__init__" else ():
            other = target_of(file, one)[0] if one.relative else room
            if other != room:
                crossings += 1
                assert floor[other] < floor[room], f"{file.relative_to(ROOT)}:{one.line} imports {other}"
    assert crossings > 10


def test_imports_for_annotations_alone_are_few():
    """A type that a file cannot import at run time is often the end of a circle."""
    found = [
        f"{file.relative_to(ROOT)}:{one.line}"
        for file in source_files("runtime")
        for one in imports(file)
        if one.relative and one.never and file.parent != ROOT / "runtime"
    ]
    assert len(found) <= MOST_TYPING_IMPORTS, found


def test_no_room_is_crowded():
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            files = [file.name for file in init.parent.glob("*.py") if file.name != "__init__.py"]
            assert len(files) <= 13, f"{init.parent.relative_to(ROOT)} has {len(files)} files"


def test_the_leaves_of_export_import_no_room():
    for leaf in LEAVES:
        file = ROOT / "export" / f"{leaf}.py"
        for found in imports(file):
            first = target_of(file, found)[:1] if found.relative else ()
            assert set(first) <= LEAVES, (
                f"{file.relative_to(ROOT)}:{found.line} imports {first[0]}, which a leaf may not"
            )


def test_no_two_modules_import_one_another():
    """At import or later: a lazy import inside a function counts, and in runtime/ one for annotations."""
    graph: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for file in source_files(folder):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            graph[module] = {
                name
                for found in imports(file)
                if found.relative and not (found.never and folder != "runtime")
                for name in [".".join((folder, *target_of(file, found)))]
            }
    assert sum(map(len, graph.values())) > 100
    on_path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        if module in done or module not in graph:
            return
        assert module not in on_path, f"a circle: {' -> '.join([*on_path[on_path.index(module) :], module])}"
        on_path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        on_path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_inside_a_folder_imports_are_relative():
    for folder in STAGES:
        for file in source_files(folder):
            for found in imports(file):
                assert not found.module.startswith(f"pastkey.{folder}"), f"{file}:{found.line} names its own folder"


def test_every_package_is_listed_and_typed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {f"pastkey.{init.parent.name}" for init in (ROOT / "pastkey").glob("*/__init__.py")} | {"pastkey"}
    found |= {
        f"pastkey.{init.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for folder in STAGES
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {f"pastkey.{s}": s for s in STAGES}
    assert (ROOT / "pastkey" / "py.typed").is_file()


def test_no_file_of_the_package_has_grown_past_a_glance():
    for folder in FOLDERS:
        for file in source_files(folder):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            assert lines <= 450, f"{file.relative_to(ROOT)} has {lines} lines: split it by noun"


# The most code lines of a folder, without docstrings and comments. A change that raises a number says in its commit
# which mechanism goes, or why both stay.
BUDGET = {
    "pastkey": 2_220, "train": 3_670, "export": 16_480, "runtime": 10_580, "serve": 1_790, "see": 660,
    "web": 130, "tests": 39_510, "tools": 2_120,
}  # fmt: skip
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> int:
    documented = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node, clean=False) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for one in tokens if one.type not in _NO_CODE for line in range(one.start[0], one.end[0] + 1)}
    return len(lines - documented)


@pytest.mark.parametrize("folder", BUDGET)
def test_a_folder_keeps_its_budget_of_code_lines(folder):
    found = sum(code_lines(file.read_text(encoding="utf-8")) for file in source_files(folder))
    assert found <= BUDGET[folder], f"{folder}/ has {found} code lines: what goes for what came?"
    assert found > BUDGET[folder] - 150, f"{folder}/ has {found} code lines: write the smaller number down"


def test_code_lines_are_those_without_docstrings_comments_and_blanks():
    assert code_lines('"""A.\n\nB."""\n\n# c\nx = """\ny\n"""\n\n\ndef f():\n    """D."""\n    return x  # e\n') == 5


def test_the_runtime_imports_neither_torch_nor_onnx():
    code = (
        "import sys, pastkey.runtime.loading, pastkey.runtime.commands.bench\n"
        "import pastkey.runtime.commands.terminal, pastkey.runtime.commands.inspection\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'transformers', 'matplotlib', 'tqdm', 'jinja2', 'llguidance'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_telemetry_is_off_before_onnxruntime_is_imported():
    """The variable is set although the environment says otherwise, and by the time the module body runs."""
    code = (
        "import os, sys, importlib.abc\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n"
        "class Spy(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'onnxruntime': print(os.environ.get('ORT_DISABLE_TELEMETRY'))\n"
        "sys.meta_path.insert(0, Spy())\n"
        "import pastkey.runtime.engine.engine\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_onnxruntime_is_imported_in_one_place():
    places = {
        file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for file in source_files(folder)
        for found in imports(file)
        if found.module.partition(".")[0] == "onnxruntime"
    }
    assert places == {"runtime/providers/ort.py"}
