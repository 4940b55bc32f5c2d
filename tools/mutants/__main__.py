"""Small faults in the product, and whether the tests find them: `python -m tools.mutants draw|cover|run`.

    python -m tools.mutants draw --seed 38 --count 120 > LIST                # of the tree as it is
    python -m tools.mutants cover LIST HITS TREE                              # which tests run the line of which mutant
    python -m tools.mutants run LIST HITS RESULTS TREE --minutes 45
    python -m tools.mutants show LIST RESULTS...

A mutant changes one comparison, constant or branch within a function, or drops one statement. The number of mutants
of a room follows its lines. TREE is a checkout that is changed, so not the one that you work in. `cover` runs all
tests once, with a mark in each line to be changed; a mark that a fixture or a child process of a test passes counts
for that test. `run` starts the tests that pass a mutant's line, the quickest first, then the others of their files, up
to the first failure. Each result is appended to RESULTS, so that a run continues where one stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOMS = ("export", "runtime", "pastkey", "train", "serve", "see", "web")
PLUGIN = Path("pastkey/mutants_plugin.py")
_FIRST = 12  # tests of a mutant that run before all others
OPPOSITE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is"}
OPPOSITE |= {"in": "not in", "not in": "in"}
_OPERATORS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip
Mutant = dict[str, Any]


class _Sites(ast.NodeVisitor):
    """The mutants of one file: (kind, start and end of what is replaced in bytes, replacement, marked expression)."""

    def __init__(self, text: str) -> None:
        self.source = text.encode()
        lines = self.source.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
        self.found: list[tuple[str, int, int, str, ast.expr]] = []
        self.functions = 0
        self.visit(ast.parse(text))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def add(self, kind: str, node: ast.expr | ast.stmt, new: str, marked: ast.expr) -> None:
        if self.functions:
            self.found.append((kind, *self.span(node), new, marked))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions += 1
        for statement in node.body:
            self.visit(statement)
        self.functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A sentence: its numbers are told, not used."""

    visit_Match = visit_JoinedStr  # type: ignore[assignment]  # noqa: N815  # patterns are no expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1 and (operator := _OPERATORS.get(type(node.ops[0]))):
            left, right = self.text(node.left), self.text(node.comparators[0])
            self.add("comparison", node, f"({left} {OPPOSITE[operator]} {right})", node)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add("constant", node, str(not node.value), node)
        elif isinstance(node.value, int | float):
            self.add("constant", node, f"({node.value!r} + 1)", node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = " or " if isinstance(node.op, ast.And) else " and "
        self.add("branch", node, f"({word.join(f'({self.text(value)})' for value in node.values)})", node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.add("branch", node.test, f"(not ({self.text(node.test)}))", node.test)
        self.generic_visit(node)

    visit_IfExp = visit_If  # noqa: N815

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add("dropped", node, "pass", node.value)
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        if node.exc is not None:
            self.add("dropped", node, "pass", node.exc)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            self.add("dropped", node, "pass", node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("dropped", node, "pass", node.value)
        self.generic_visit(node)


def _room(path: Path) -> str:
    """The folder of a stage, and of the two large ones the folder below."""
    return "/".join(path.parts[:2]) if path.parts[0] in ("export", "runtime") and len(path.parts) > 2 else path.parts[0]


def draw(root: Path, seed: int, count: int) -> list[Mutant]:
    """Mutants of all rooms, by their lines; of each kind of one room about as many."""
    sites: dict[str, list[tuple[Path, tuple[str, int, int, str, ast.expr], bytes]]] = defaultdict(list)
    lines: Counter[str] = Counter()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root)
            found = _Sites(path.read_text())
            lines[_room(place)] += len(found.starts)
            sites[_room(place)] += [(place, site, found.source) for site in found.found]
    share = {room: count * number / lines.total() for room, number in lines.items()}
    numbers = {room: int(number) for room, number in share.items()}
    for room in sorted(share, key=lambda room: numbers[room] - share[room])[: count - sum(numbers.values())]:
        numbers[room] += 1
    choose, drawn, chosen = random.Random(seed), list[Mutant](), set[tuple[object, ...]]()
    for room in sorted(numbers):
        kinds = sorted({site[0] for _, site, _ in sites[room]})
        for _ in range(numbers[room]):
            kind = kinds[len(drawn) % len(kinds)]
            place, (_, start, end, new, marked), source = choose.choice([
                one for one in sites[room]
                if one[1][0] == kind and (one[0].as_posix(), *one[1][1:4:2]) not in chosen
            ])  # fmt: skip
            chosen.add((place.as_posix(), start, new))
            span = _Sites(source.decode()).span(marked)
            drawn.append({
                "id": len(drawn), "room": room, "kind": kind, "path": place.as_posix(),
                "line": source[:start].count(b"\n") + 1, "start": start, "old": source[start:end].decode(), "new": new,
                "marked": span,
            })  # fmt: skip
    return drawn


def changed(tree: Path, mutants: list[Mutant], marks: bool) -> Iterator[tuple[Path, bytes]]:
    """The files of TREE with the mutants, or with a mark in the line of each."""
    for path in sorted({mutant["path"] for mutant in mutants}):
        text = (tree / path).read_bytes()
        edits = list[tuple[int, int, str]]()
        for mutant in (mutant for mutant in mutants if mutant["path"] == path):
            start, end = mutant["start"], mutant["start"] + len(mutant["old"].encode())
            assert text[start:end].decode() == mutant["old"], (
                f"{path} is not the file that mutant {mutant['id']} was drawn from"
            )
            if marks:
                start, end = mutant["marked"]
                mark = f"(__import__('pastkey.mutants_plugin').mutants_plugin.hit({mutant['id']}), ("
                edits += [(start, 0, mark), (end, -1, "))[1]")]
            else:
                edits.append((start, end - start, mutant["new"]))
        for position, length, new in sorted(edits, reverse=True):
            text = text[:position] + new.encode() + text[position + max(length, 0) :]
        yield tree / path, text


def _pytest(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pastkey.mutants_plugin", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=tree, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | variables,
    )  # fmt: skip


def cover(mutants: list[Mutant], hits: Path, tree: Path, arguments: list[str]) -> None:
    """Runs all tests of TREE with the marks."""
    (tree / PLUGIN).write_bytes(Path(__file__).with_name("plugin.py").read_bytes())
    files = list(changed(tree, mutants, marks=True))
    before = {path: path.read_bytes() for path, _ in files}
    try:
        for path, text in files:
            path.write_bytes(text)
        done = _pytest(tree, *arguments, MUTANT_HITS=str(hits.absolute()))
        print(done.stdout[-3000:], done.stderr[-1000:])
    finally:
        for path, text in before.items():
            path.write_bytes(text)


def _killer(tree: Path, tests: dict[str, float], began: float) -> str:
    """Returns the first of the tests, with their usual seconds in the order to run, that fails; "" if none does."""
    order = tree / "mutant-tests.json"
    order.write_text(json.dumps(tests))
    files = sorted({name.partition("::")[0] for name in tests})
    ran = _pytest(tree, "-x", *files, MUTANT_TESTS=str(order), MUTANT_BEGAN=str(began))
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (failed or ["ERROR of pytest"])[0][:200] if ran.returncode else ""


def run(mutants: list[Mutant], hits: Path, results: Path, tree: Path, minutes: float) -> None:
    """Runs the tests of each mutant that has no result so far."""
    (tree / PLUGIN).write_bytes(Path(__file__).with_name("plugin.py").read_bytes())
    passing, seconds = defaultdict[str, set[str]](set), dict[str, float]()
    for line in hits.read_text().splitlines():
        first, name, *rest = line.split("\t")
        if first != "seconds":
            passing[first].add(name)
        elif rest[1] == "passed":
            seconds[name] = float(rest[0])
    end = time.monotonic() + 60 * minutes
    done = {json.loads(line)["id"] for line in results.read_text().splitlines()} if results.exists() else set()
    for mutant in mutants:
        if mutant["id"] in done or time.monotonic() > end:
            continue
        exact = passing[str(mutant["id"])]
        files = {name.partition("::")[0] for name in exact}
        chosen = {name: number for name, number in seconds.items() if name.partition("::")[0] in files}
        names = sorted(chosen, key=lambda name: (name not in exact, chosen[name]))
        began, killer = time.monotonic(), ""
        [(path, text)] = changed(tree, [mutant], marks=False)
        before = path.read_bytes()
        try:
            path.write_bytes(text)
            # Most mutants are found by the quickest tests, whose files are collected soon.
            for some in filter(None, (names[:_FIRST], names[_FIRST:])):
                killer = killer or _killer(tree, {name: chosen[name] for name in some}, began)
        finally:
            path.write_bytes(before)
        result = {"id": mutant["id"], "tests": len(exact), "killer": killer, "seconds": round(time.monotonic() - began)}
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(mutant["path"], mutant["line"], mutant["kind"], result, flush=True)


def show(mutants: list[Mutant], results: list[Path]) -> None:
    """Killed by room, and the survivors, of one run or of several parallel ones."""
    found = [{row["id"]: row for row in map(json.loads, path.read_text().splitlines())} for path in results]
    for room in [*sorted({mutant["room"] for mutant in mutants}), ""]:
        here = [mutant for mutant in mutants if room in ("", mutant["room"])]
        counts = [sum(bool(rows.get(mutant["id"], {}).get("killer")) for mutant in here) for rows in found]
        print(f"{room or 'all':<24}{len(here):>5}", *(f"{count:>5}" for count in counts))
    for mutant in mutants:
        lives = [not rows[mutant["id"]]["killer"] if mutant["id"] in rows else None for rows in found]
        if any(lives):
            place, old, new = f"{mutant['path']}:{mutant['line']}", mutant["old"][:60], mutant["new"][:60]
            print(lives, place, mutant["kind"], old, "->", new)


def main(arguments: list[str] | None = None) -> None:
    """Does what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    asked = kinds.add_parser("draw")
    asked.add_argument("--seed", type=int, default=38)
    asked.add_argument("--count", type=int, default=120)
    for what in ("cover", "run", "show"):
        asked = kinds.add_parser(what)
        asked.add_argument("list", type=Path)
        if what == "show":
            asked.add_argument("results", type=Path, nargs="+")
            continue
        asked.add_argument("hits", type=Path)
        if what == "run":
            asked.add_argument("results", type=Path)
            asked.add_argument("--minutes", type=float, default=45)
        asked.add_argument("tree", type=Path)
        if what == "cover":
            asked.add_argument("arguments", nargs="*", default=["-m", "not matrix"])
    given = parser.parse_args(arguments)
    if given.what == "draw":
        for mutant in draw(Path(__file__).parents[2], given.seed, given.count):
            print(json.dumps(mutant))
        return
    mutants = [json.loads(line) for line in given.list.read_text().splitlines()]
    if given.what == "cover":
        cover(mutants, given.hits, given.tree.absolute(), given.arguments)
    elif given.what == "run":
        run(mutants, given.hits, given.results, given.tree.absolute(), given.minutes)
    else:
        show(mutants, given.results)


if __name__ == "__main__":
    main()
