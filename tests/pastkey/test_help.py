"""`--help` of all commands."""

from __future__ import annotations

import contextlib
import re

import pytest

from pastkey.__main__ import COMMANDS, GROUPS, main

GROUPS_OF_RUN = (
    "prompt (one of these)", "length and end", "choice of tokens", "penalties", "constraints (one of these)", "output",
    "context, cache and drafts", "rare", "further models", "device", "a bundle that you do not trust", "example",
)  # fmt: skip


@pytest.fixture
def told(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def tell(*words):
        with contextlib.suppress(SystemExit):
            main([*words])
        out, err = capsys.readouterr()
        return out + err

    return tell


def test_the_overview_has_all_commands_in_four_groups_with_an_example_each(told):
    overview = told("--help")
    assert list(GROUPS) == ["make", "use", "look", "check"]
    assert re.findall(r"^(\w+):$", overview, re.M) == list(GROUPS)
    assert overview.count("\n  example:  pastkey ") == len(GROUPS)
    assert all(re.search(rf"^  {name} ", overview, re.M) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_usage_of_one_line_an_example_and_one_style_of_defaults(told, name):
    usage, _, rest = told(name, "--help").partition("\n\n")
    assert re.fullmatch(rf"usage: pastkey {name}( \[?[\w.]+\]?| --[\w-]+ [\w.]+)* \[options\]", usage)
    assert re.search(rf"^  pastkey {name}( |$)", rest, re.M)
    defaults = re.findall(r"\(default[^)]*\)", rest.replace("\n", " "))
    assert all(default.startswith("(default: ") for default in defaults)
    assert not re.search(r"\((\d+(\.\d+)?|none)\)$", rest, re.M)


def test_the_options_of_run_are_in_groups(told):
    headings = re.findall(r"^([a-z].*):$", told("run", "--help"), re.M)
    assert headings == ["positional arguments", "options", *GROUPS_OF_RUN]


def test_a_default_that_is_the_models_is_not_told_as_a_number(told):
    assert "tokens are drawn (default: the model's, or 0.0)" in re.sub(r"\s+", " ", told("chat", "--help"))


@pytest.mark.parametrize(("word", "near"), [("exprot", "export"), ("--verson", "--version"), ("inspct", "inspect")])
def test_an_unknown_command_names_the_nearest(told, word, near):
    assert told(word) == f"pastkey: no command {word!r}; did you mean {near}?\n"
