"""The mutants of `python -m tools.mutants`: each is a program, each changes one place, and its mark changes nothing."""

from __future__ import annotations

import ast

import pytest

from tools.mutants import __main__ as mutants
from tools.mutants import plugin

SOURCE = '''"""What a mutant may change: 1 == 1."""

LIMIT = 3


def choose(numbers, most=2):
    """Docstring with 4."""
    kept = []
    for number in numbers:
        if number > 1 and number != 5:
            kept.append(number)
    if not kept:
        raise ValueError(f"nothing of {len(numbers) + 7}")
    kept[0] += most
    return kept[:2] if most is not None else (yield_ := kept)
'''


@pytest.fixture
def tree(tmp_path):
    for room in mutants.ROOMS:
        (tmp_path / room).mkdir()
    (tmp_path / "runtime" / "choose.py").write_text(SOURCE)
    return tmp_path


def test_a_mutant_changes_one_place_within_a_function(tree):
    drawn = mutants.draw(tree, seed=1, count=12)
    assert drawn == mutants.draw(tree, seed=1, count=12) != mutants.draw(tree, seed=2, count=12)
    assert {mutant["kind"] for mutant in drawn} == {"branch", "comparison", "constant", "dropped"}
    texts = set[str]()
    for mutant in drawn:
        assert mutant["line"] > 7
        [(_, text)] = mutants.changed(tree, [mutant], marks=False)
        ast.parse(text)
        texts.add(text.decode())
    assert len(texts) == len(drawn)
    assert SOURCE not in texts


def test_a_mark_tells_the_running_test_and_changes_nothing(tree, tmp_path, monkeypatch):
    [(_, text)] = mutants.changed(tree, mutants.draw(tree, seed=1, count=12), marks=True)
    passed: list[int] = []
    marked = text.decode().replace("__import__('pastkey.mutants_plugin').mutants_plugin.hit", "passed.append")
    plain, names = dict[str, object](), dict[str, object](passed=passed)
    exec(SOURCE, plain)
    exec(marked, names)
    assert names["choose"]([1, 2, 3]) == plain["choose"]([1, 2, 3]) == [4, 3]
    assert len(set(passed)) > 6
    monkeypatch.setenv("MUTANT_HITS", str(tmp_path / "hits"))
    for phase in ("setup", "call", "call"):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"tests/test_it.py::test_it[a b] ({phase})")
        plugin.hit(3)
    assert (tmp_path / "hits").read_text() == "3\ttests/test_it.py\n3\ttests/test_it.py::test_it[a b]\n"
