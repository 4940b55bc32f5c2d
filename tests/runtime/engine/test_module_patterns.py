"""Patterns of modules: peft's meaning, in bounded time."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from pastkey.errors import InputError
from pastkey.runtime.engine import module_patterns
from pastkey.runtime.engine.module_patterns import ModulePatterns

FILE = Path("adapter_config.json")
NAMES = [
    "a", "b", "ab", "a.b", "a.1.b", "aa.bb.ab", "layers.1.q_proj", "model.layers.12.q_proj", "_", "a-b", ".a", "a.",
]  # fmt: skip
PIECES = r"a b ab . \. 1 \d \w [a-c] [^.] ( (?: ) | * + ? {2} {1,2} {,2} {1,} {2,1} ^ $ *? ** _ \_ layers q_proj .* .+"


def first_by_peft(patterns: Sequence[str], name: str) -> str | None:
    """As peft.utils.other.get_pattern_key, but None where none matches."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


@pytest.mark.parametrize(
    "patterns",
    [
        ["model.layers.1.q_proj", "layers.1.q_proj", "q_proj"],
        [r"^model\.layers\.\d+\.(q|k)_proj$", "q_proj"],
        [r"(?:a|b)\.1\.b", r"[a-z]{2}", r"[^.]+"],
        ["", "|a", "(a|)(|b)"],
    ],
)
def test_the_first_that_matches_is_that_of_peft(patterns):
    found = ModulePatterns(patterns, FILE)
    for name in NAMES:
        assert found.first(name) == first_by_peft(patterns, name)


def test_what_is_accepted_at_random_has_the_meaning_of_peft():
    rng, accepted, matched = random.Random(7), 0, 0
    for _ in range(1500):
        pattern = "".join(rng.choices(PIECES.split(), k=rng.randint(1, 7)))
        try:
            found = ModulePatterns([pattern], FILE)
        except InputError:
            continue
        accepted += 1
        for name in NAMES:
            assert found.first(name) == first_by_peft([pattern], name), (pattern, name)
            matched += found.first(name) is not None
    assert min(accepted, matched) > 250


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\w+\.?)+x!", "(.*)*(.*)*(.*)*x", "(a|b)?", "(a){2}", "(", ")", "(a", "a)", "a**", "a*+", "*", "^*", "a|*",
        "[", "[z-a]", "[]a]", "[^]", "a{2,1}", r"\b", r"\1", "\\", r"\p", "(?i)a", "(?=a)", "(?P<n>a)", "{", "a}",
    ],
)  # fmt: skip
def test_other_patterns_are_refused_by_name(pattern):
    with pytest.raises(InputError, match=re.escape(f"has the alpha_pattern {pattern!r}; names and plain patterns")):
        ModulePatterns(["a", pattern], FILE)


@pytest.mark.parametrize(
    "pattern", ["(a|a)" * 60 + "x", "a?" * 60 + "a" * 60 + "x", ".*" * 60 + "x", "(a|aa)" * 60 + "x", "[a.]{0,99}" * 60]
)
def test_what_takes_re_exponential_time_ends(pattern):
    assert ModulePatterns([pattern], FILE).first("a" * 60 + "!") is None


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        pytest.param([".*" * 400 + "x"], ["a." * 500], id="long"),
        pytest.param(["(" + "|" * 400 + ")"], ["." * 1000], id="branches"),
        pytest.param([f"{number}?" for number in range(1000)], ["a"], id="parts"),
        pytest.param([str(number) for number in range(300)], [f"a.{number}!" for number in range(300)], id="many"),
    ],
)
def test_what_takes_too_long_is_refused(patterns, names, monkeypatch):
    monkeypatch.setattr(module_patterns, "_MOST_STEPS", 100_000)
    with pytest.raises(InputError, match="an alpha_pattern that takes too long to match"):
        list(map(ModulePatterns(patterns, FILE).first, names))
