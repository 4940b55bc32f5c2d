"""What llama.cpp's tests expect of public chat templates, where they are at hand.

`PASTKEY_LLAMA_CPP` is the folder of llama.cpp's source, as a checkout has it, or the source distribution of
llama-cpp-python below vendor/.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from pastkey.runtime.text.chat_template import ChatTemplate

jinja2 = pytest.importorskip("jinja2")

SOURCE = Path(os.environ.get("PASTKEY_LLAMA_CPP", "absent")) / "tests" / "test-chat-template.cpp"
FIELDS = ("name", "template", "expected", "expected_jinja", "bos_token", "eos_token", "supported", "more")
CONVERSATION = [
    ("system", "You are a helpful assistant"),
    ("user", "Hello"),
    ("assistant", "Hi there"),
    ("user", "Who are you"),
    ("assistant", "   I am an assistant   "),
    ("user", "Another question"),
]
# Templates that know no system message. llama.cpp puts it before the first question, as transformers does not.
WITHOUT_SYSTEM = (
    "mistralai/Mistral-7B-Instruct-v0.2 (NOTE",
    "google/gemma-7b-it",
    "OrionStarAI/Orion-14B-Chat",
    "Phi-3-mini",
    "Phi-3-medium",
    "yandex/YandexGPT-5-Lite-8B-instruct",
)
_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"((?:[^"\\]|\\.)*)"|([{}]|\btrue\b|\bfalse\b)|.', re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def initializer(text: str) -> list[Any]:
    """The first {...} of C++ as nested lists of strings and truth values; strings side by side are one."""
    stack: list[list[Any]] = [[]]
    side_by_side = False
    for token in _TOKEN.finditer(text):
        literal, word = token.groups()
        if literal is not None:
            value = re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), literal)
            if side_by_side:
                stack[-1][-1] += value
            else:
                stack[-1].append(value)
            side_by_side = True
        elif word == "{":
            stack.append([])
        elif word == "}":
            ended = stack.pop()
            stack[-1].append(ended)
            if len(stack) == 1:
                found: list[Any] = stack[0][0]
                return found
        elif word:
            stack[-1].append(word == "true")
        if word or token[0] == ",":
            side_by_side = False
    raise AssertionError("the braces do not close")


def cases() -> list[dict[str, Any]]:
    if not SOURCE.is_file():
        return []
    text = SOURCE.read_text(encoding="utf-8")
    place = text.index("std::vector<TestCase> test_cases")
    return [dict(zip(FIELDS, case, strict=False)) for case in initializer(text[place:])]


CASES = cases()


def test_cpp_is_read_as_it_is_written() -> None:
    text = r'x {{ /* .name= */ "a", U8C("b\n" "c\"{"), true }, // {"no"}' + "\n" + r'{"d", {{"e", "f"}}, "", false}};'
    assert initializer(text) == [["a", 'b\nc"{', True], ["d", [["e", "f"]], "", False]]


@pytest.mark.skipif(not SOURCE.is_file(), reason="PASTKEY_LLAMA_CPP names no source of llama.cpp")
def test_there_are_cases() -> None:
    names = [case["name"] for case in CASES]
    assert len(names) >= 36
    assert all(any(name.startswith(without) for name in names) for without in WITHOUT_SYSTEM)


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_renderings_are_llama_cpps(case: dict[str, Any]) -> None:
    if not case.get("supported", True):
        pytest.skip("not by llama.cpp's Jinja either")
    messages = [{"role": role, "content": content} for role, content in [*CONVERSATION, *case.get("more", [])]]
    if case["name"].startswith(WITHOUT_SYSTEM):
        system, first = messages[:2]
        messages[:2] = [first | {"content": f"{system['content']}\n{first['content']}"}]
    tokens = {name: case.get(name, "") for name in ("bos_token", "eos_token")}
    found = ChatTemplate(case["template"], tokens).render(messages)
    assert found == (case["expected_jinja"] or case["expected"])
