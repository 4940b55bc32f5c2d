"""The tests of a room, which is a folder of the package, are in the folder of tests of that name."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from pastkey.__main__ import COMMANDS

from .shared import ROOT, divided

FOLDERS = ("pastkey", "train", "export", "runtime", "serve", "web", "see")


def modules() -> list[str]:
    found = [file.relative_to(ROOT).as_posix() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(found) > 70
    return sorted(name for name in found if not name.endswith("__init__.py"))


@functools.cache
def imports(file: Path) -> frozenset[Path]:
    """The modules of the package and of the tests that a file imports, anywhere in it; also those of its commands."""
    place = file.relative_to(ROOT).parts[:-1]
    package = place if place[0] == "tests" else ("pastkey", *place)
    found = set[tuple[str, ...]]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {base, *((*base, alias.name) for alias in node.names)}
        elif place[0] == "tests" and isinstance(node, ast.Constant) and node.value in COMMANDS:
            found.add(("pastkey", *COMMANDS[node.value][0].split(".")))
    places = {"/".join(parts[1:] if parts[1:2] and parts[1] in FOLDERS else parts) for parts in found}
    files = (path for place in places for path in (ROOT / f"{place}.py", ROOT / place / "__init__.py"))
    return frozenset(filter(Path.is_file, files))


def test_the_tests_of_a_room_import_each_of_its_modules():
    """Themselves, through their own helpers and fixtures, or through other modules of the same stage."""
    for room in {Path(name).parent for name in modules()}:
        above = [ROOT / "tests" / folder / "conftest.py" for folder in (room, *room.parents[:-1])]
        wanted = {*(ROOT / "tests" / room).glob("*.py"), *filter(Path.is_file, above)}
        reached = set[Path]()
        while wanted:
            file = wanted.pop()
            if file not in reached and file.relative_to(ROOT).parts[0] in ("tests", room.parts[0]):
                reached.add(file)
                wanted |= imports(file)
        missing = [name for name in modules() if Path(name).parent == room and ROOT / name not in reached]
        assert missing == [], f"no test in tests/{room} imports them"


def test_the_rooms_of_the_tests_are_those_of_the_package():
    rooms = {init.parent.relative_to(ROOT) for folder in FOLDERS for init in (ROOT / folder).rglob("__init__.py")}
    tested = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    others = {Path(), *map(Path, ("programs", "fuzz", "kernels", "conformance", "oracles"))}
    assert tested - rooms <= others, "a folder of tests without a room"
    assert rooms <= tested


def test_what_only_make_matrix_runs_is_slow_too(request):
    """Whichever tests were chosen: `make test` would run one that is not, and so fail here."""
    items = request.session.items
    assert all(item.get_closest_marker("slow") for item in items if item.get_closest_marker("matrix"))
    chosen = divided("abc", quick="a", ci="b")
    assert [[mark.name for mark in case.marks] for case in chosen] == [[], ["slow"], ["matrix"]]
