"""Every example is short and does what its docstring says: the commands in it are run."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.client
import json
import os
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from pastkey.__main__ import main
from pastkey.runtime import AsyncStream, LanguageModel, load

from .runtime.decoding.batching import waiting
from .shared import ROOT, divided, ran
from .tiny_bundles import byte_bundle, letters_bundle

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def commands(file: Path) -> list[str]:
    """The arguments of `pastkey` in the docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.findall(r"^pastkey (export .*)$", docstring, re.MULTILINE)


# Those of a module: a program's docstring exports a model of the Hub. The lesson exports itself.
EXPORTS = [line for file in EXAMPLES for line in commands(file) if ".py:" in line and "lesson" not in line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands are typed: examples/ is there, and what they write is not in the checkout."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", divided(EXPORTS))
def test_an_example_exports_verifies_and_runs(command, folder, capsys):
    _, source, *_, bundle = command.split()
    assert main(command.split()) == 0
    assert main(["verify", bundle, source]) == 0
    capsys.readouterr()
    assert main(["run", bundle, "--prompt-ids", "1,2,3", "--max-new-tokens", "8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ids"]) == 8


@pytest.mark.slow
def test_the_lesson_trains_exports_itself_and_answers(folder):
    done = ran(sys.executable, "examples/lesson.py", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.stdout == "the owl does\n"
    manifest = json.loads((folder / "lesson" / "pastkey.json").read_text(encoding="utf-8"))
    assert (manifest["graph"], manifest["precision"]) == ("fused", "int8")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "node"), [("gru", "GRU"), ("linear_attention", "LinearAttention")])
def test_a_recurrent_example_learns_the_lessons_and_keeps_them_exported(name, node, folder, capsys):
    tokenizer = ("--tokenizer", "examples/lesson.py:tokenizer")
    command = ("export", f"examples/{name}.py:trained", *tokenizer, "--context", "64", "--eos", "0", "--out", name)
    assert main([*command]) == 0
    assert json.loads((folder / name / "pastkey.json").read_text(encoding="utf-8"))["operators"][node] == 2
    capsys.readouterr()
    assert main(["run", name, "--prompt", "who sleeps all day ?"]) == 0
    assert capsys.readouterr().out.strip() == "the cat does"


# --- programs that use a bundle -----------------------------------------------------------------------------------
@pytest.fixture
def bundle(tmp_path):
    """A decoder of random weights that accepts any text and holds conversations."""
    config = {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"}
    return byte_bundle(tmp_path / "b", tokenizer_config=config).path


@pytest.fixture
def lm(bundle):
    return load(bundle, threads=1)


class Gate:
    """Lets a model run so many steps, and counts them."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        graph = lm.require_open().graph
        self.run = graph.run
        self.close()
        monkeypatch.setattr(graph, "run", self.gated)

    def gated(self, *arguments: Any) -> Any:
        self.steps.acquire()
        self.ran += 1
        return self.run(*arguments)

    def close(self) -> None:
        self.ran, self.steps = 0, threading.Semaphore(0)


def example(name: str, *words: object, run_name: str = "example") -> dict[str, Any]:
    """What an example defines; as a program it has these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, words)])
        return runpy.run_path(str(ROOT / "examples" / name), run_name=run_name)


def test_what_is_extracted_is_an_instance(bundle, capsys):
    """Whatever the weights, every answer is JSON."""
    pytest.importorskip("llguidance")
    made = example("extract.py", bundle, "Anna from Berlin wants 日 apples.", run_name="__main__")
    told = capsys.readouterr().out
    order = eval(told.rpartition(" (")[0], {"Order": made["Order"], "Item": made["Item"]})
    assert isinstance(order, made["Order"])
    assert all(isinstance(item.name, str) and 0 <= item.count <= 999 for item in order.items)
    assert order.delivery in ("post", "courier", "unknown")
    assert told.endswith("tokens were certain)\n")


# --- a route that streams -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def served(lm: LanguageModel) -> Iterator[int]:
    """The application of fastapi_stream.py on a free port of loopback, in a thread."""
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    app = example("fastapi_stream.py")["application"](lm)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        waiting.until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def asked(port: int, path: str, **query: object) -> http.client.HTTPResponse:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.request("GET", f"{path}?{urlencode(query)}", headers={"Connection": "close"})
    return client.getresponse()


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the data of each server-sent event."""
    name = "message"
    for line in response:
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_a_client_that_leaves_ends_the_generation_within_a_step(lm, monkeypatch):
    gate, cancelled, cancel = Gate(lm, monkeypatch), threading.Event(), AsyncStream.cancel

    def noted(stream: AsyncStream) -> None:
        cancel(stream)
        cancelled.set()

    monkeypatch.setattr(AsyncStream, "cancel", noted)
    with served(lm) as port:
        gate.steps.release(5)
        with asked(port, "/stream", prompt="abc", max_new_tokens=800) as response:
            assert [name for name, _ in (next(events(response)) for _ in range(5))] == ["message"] * 5
        assert cancelled.wait(60)
        gate.steps.release(1000)
        waiting.until(lambda: lm.scheduler.live == 0)
    assert gate.ran <= 6  # the step that ran when it left was the last


def test_a_text_is_streamed_and_a_mistake_of_a_client_is_a_status_and_a_sentence(lm):
    with served(lm) as port:
        assert b"EventSource" in asked(port, "/").read()
        *texts, end = events(asked(port, "/stream", prompt="日本", max_new_tokens=40))
        assert end == ("end", {"finish_reason": "length"})
        assert "".join(data["text"] for _, data in texts) == lm.generate("日本", max_new_tokens=40).text
        too_long = asked(port, "/stream", prompt="x" * 2000)
        assert too_long.status == 400
        assert "the context is 900" in json.load(too_long)["detail"]
        assert asked(port, "/stream", prompt="x", max_new_tokens=0).status == 422


# --- a chat window ------------------------------------------------------------------------------------------------
def test_the_window_shows_answers_stops_them_and_brings_questions_back(lm, monkeypatch):
    pytest.importorskip("textual")
    window = example("textual_chat.py")["ChatWindow"](lm.chat())
    gate = Gate(lm, monkeypatch)

    async def use() -> None:
        async with window.run_test() as pilot:
            line = window.query_one("Input")

            async def until(holds: Callable[[], bool]) -> None:
                await asyncio.to_thread(waiting.until, holds)
                await pilot.pause()

            line.value = "[b]Who?"
            gate.steps.release(1000)
            await pilot.press("enter")
            await until(lambda: not window.workers)
            question, answer = [part.content for part in window.said.children]
            assert (question, answer) == ("[b]Who?", window.chat.messages[-1]["content"])

            # An answer is stopped. What the line holds meanwhile waits, and is not asked.
            gate.close()
            gate.steps.release(5)
            await pilot.press("x", "enter")
            await until(lambda: bool(window.said.children[-1].content))
            await pilot.press("y", "enter", "escape")
            gate.steps.release(1000)
            await until(lambda: not window.workers)
            assert gate.ran <= 6
            assert len(window.said.children) == 4
            assert window.chat.messages[-1]["content"].startswith(window.said.children[-1].content)

            await pilot.press("up", "up")
            assert line.value == "[b]Who?"
            await pilot.press("down", "down", "down")
            assert line.value == ""

    asyncio.run(use())


# --- a wheel with a bundle ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_wheel_brings_its_model(bundle, lm, tmp_path):
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    shutil.copytree(ROOT / "examples" / "own_wheel", source, ignore=shutil.ignore_patterns("bundle"))
    shutil.copytree(bundle, source / "storyteller" / "bundle")
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ran(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    ran(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    shutil.rmtree(source)
    expected = lm.generate("Once upon", max_new_tokens=60, temperature=0.7, seed=1).text + "\n"
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = [sys.executable, "-W", "error", "-m", "storyteller", "Once upon"]
    assert ran(*told, cwd=elsewhere, env=os.environ | {"PYTHONPATH": path}).stdout == expected


def test_questions_are_answered_by_a_pool_and_once_each(tmp_path, capsys):
    """A line that was cut is answered again, one that is whole is not."""
    bundle = letters_bundle(tmp_path / "b")
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked = [json.dumps({"question": letter, "of": "é"}) for letter in ["abc", *"defghijklm"]]
    questions.write_text("\n\n".join([asked[0], "\n".join(asked[1:])]))
    mine = {"number": 0, "question": "abc", "of": "é", "answer": "mine"}
    answers.write_text(json.dumps(mine) + '\n{"number": 5, "answer": "cut in the mid')
    example("questions.py", bundle.path, questions, answers, run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1] == "11 of 11"
    found = {row["number"]: row for row in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
    assert sorted(found) == [0, *range(2, 12)]
    assert found[0] == mine
    assert found[5].items() >= {"number": 5, "question": "g", "of": "é"}.items()
    assert found[5]["answer"] != "cut in the mid"
    before = answers.read_bytes()
    example("questions.py", bundle.path, questions, answers, run_name="__main__")
    assert answers.read_bytes() == before
