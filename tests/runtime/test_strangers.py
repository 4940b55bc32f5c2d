"""Whatever a program that embeds the runtime gives to it: a value comes back, or one sentence, and all goes on after.

The callables are read off the package, and each parameter of each is given every odd value. A new method fails here
until it has a row in CALLS, or a reason in LEFT_OUT.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError, PastkeyError
from pastkey.runtime import Chat
from pastkey.runtime.model.signature import new_key

from .conftest import E, Tiny, V
from .strangers import (
    CALLS,
    FEW,
    LEFT_OUT,
    PROMPT,
    SURFACE,
    OwnError,
    Silent,
    World,
    begun,
    complaint,
    complaints,
    consumed,
    nested,
    odd_values,
    public,
    raises,
    read,
)

pytestmark = pytest.mark.filterwarnings("ignore::pastkey.errors.TemplateWarning")

TEMPLATE = "{% for m in messages %}{{ m.content }}.{% endfor %}"


@pytest.fixture(scope="module")
def world(letters: Tokenizer, make_bundle: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> World:
    small = Tiny.random([(8, 8), (16, 16)], context_length=48)
    fields = {"tokenizer": letters, "hidden_size": E, "tokenizer_config": {"chat_template": TEMPLATE}}
    folder = tmp_path_factory.mktemp("files")
    world = begun(make_bundle(small, "fused", **fields).path, folder)
    world.session.save(folder / "session")
    world.chat.save(folder / "chat.json")
    return world


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a relative path that something is saved at does no harm."""
    monkeypatch.chdir(tmp_path)


def test_every_public_method_has_a_row_or_a_reason() -> None:
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    rows = {name for name in CALLS if "." in name}
    assert set(public(SURFACE)) - rows == left_out
    assert rows <= set(public(SURFACE)), "a row of a method that is gone"


@pytest.mark.parametrize("name", CALLS)
def test_an_odd_value_is_taken_or_told(world: World, name: str, tmp_path: Path) -> None:
    found = list(complaints(world, name, tmp_path))
    assert not found, "\n".join(found)


# --- what may not be taken --------------------------------------------------------------------------------------------
REFUSED: dict[tuple[str, str], tuple[Any, ...]] = {
    ("LanguageModel.generate", "prompt"): (
        None,
        1,
        [],
        b"ab",
        [-1],
        [V],
        [2**63],
        [True],
        [1.5],
        "a\ud800",
        {1: 2},
        {1},
    ),
    ("LanguageModel.generate", "n"): (0, -1, True, 1.5, 10**30, "1"),
    ("LanguageModel.generate", "max_new_tokens"): (True, 1.5, -1, None, "1", float("nan")),
    ("LanguageModel.generate", "timeout"): (0, -1, float("nan"), float("inf"), True, "1"),
    ("LanguageModel.generate", "stop"): (None, "", [""], [1], 1, b"a", {"a": 1}),
    ("LanguageModel.generate", "logits_processor"): (None, 1, "a", [None], raises, lambda *_: None),
    ("LanguageModel.generate", "json_schema"): (False, "false", 1, "", [], "{", {"a": float("nan")}),
    ("LanguageModel.generate", "choices"): ("ab", [], [""], [1], {"a": 1}, 1),
    ("LanguageModel.generate", "seed"): (-1, 2**63, True, 1.5),
    ("LanguageModel.generate", "temperature"): (-1, float("nan"), float("inf"), True, "1"),
    ("LanguageModel.generate", "reuse_prefix"): (1, None, "yes", np.array([])),
    ("LanguageModel.stream_many", "prompts"): (None, [], "ab", 1, [None], [[1], None], np.zeros((1, 1, 1), np.int64)),
    ("LanguageModel.logits", "ids"): ("ab", [[1]], [], [V], [1.5], None),
    ("LanguageModel.embed", "pooling"): (None, "max", 1, ["mean"]),
    ("LanguageModel.chat", "messages"): ([],),
    ("Session.trim", "length"): (-1, 10**6, 1.5, True, None),
    ("Generator.__call__", "batch"): (
        None,
        [1],
        "ab",
        {"prompt": "ab"},
        {"prompt": ["a"], "id": [1, 2]},
        {"prompt": 1},
    ),
    ("load", "path"): (None, 1, "", "a\0b", "/" + "b" * 5000, b"ab", "\ud800"),
    ("load", "verify"): (1, "no", np.array([])),
    ("load", "max_batch"): (0, True, None, 1.5),
}


@pytest.mark.parametrize(("name", "parameter"), REFUSED)
def test_what_has_no_meaning_is_refused(world: World, name: str, parameter: str) -> None:
    function, given = CALLS[name](world)
    for value in REFUSED[name, parameter]:
        with pytest.raises(PastkeyError):
            consumed(function(**{**given, parameter: value}))


MESSAGES: tuple[Any, ...] = (
    None, 1, "ab", {}, {"role": "user", "content": "a"}, ["ab"], [None], [{}], [{"content": "a"}],
    [{"role": None, "content": "a"}], [{"role": 1, "content": "a"}], [{"role": "", "content": "a"}], [{"role": "user"}],
    [{"role": "user", "content": 1}], [{"role": "user", "content": None}], [{"role": "user", "content": []}],
    [{"role": "user", "content": ["a"]}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": nested(dict)}], [{"role": "user", "content": "a", "extra": nested(dict)}],
    [{"role": "user", "content": "a", "extra": Silent()}], [{"role": "assistant", "tool_calls": [{}]}],
    [{"role": "user", "content": "a"}] * 10_000,
)  # fmt: skip


@pytest.mark.parametrize("place", range(len(MESSAGES)))
def test_a_conversation_that_is_none_is_told_and_stays(world: World, place: int, tmp_path: Path) -> None:
    calls: dict[str, Callable[[Chat], Any]] = {
        "ask": lambda chat: chat.ask("a", **FEW),
        "prompt_ids": Chat.prompt_ids,
        "undo": Chat.undo,
        "drop": Chat.drop,
        "set_system": lambda chat: chat.set_system("a"),
        "add_tool_result": lambda chat: chat.add_tool_result("a", name="f"),
        "save": lambda chat: chat.save(tmp_path / "chat.json"),
    }
    for name, call in calls.items():
        chat = world.lm.chat()
        chat.messages = MESSAGES[place]
        found = complaint(lambda: call(chat))  # noqa: B023 - is called at once
        assert found is None, f"{name}: {found}"
        if name in ("ask", "prompt_ids"):
            assert chat.messages is MESSAGES[place]
        chat.reset()
        assert chat.ask("abc", **FEW).ids == world.lm.chat().ask("abc", **FEW).ids


def test_an_error_of_a_callers_own_function_comes_out_and_ends_the_call(world: World) -> None:
    expected = world.lm.generate(PROMPT, **FEW).ids
    with pytest.raises(OwnError):
        world.lm.generate([PROMPT, "abc"], raises, **FEW)
    with pytest.raises(InputError, match="logits_processor raises raised OwnError") as told:
        world.lm.generate(PROMPT, logits_processor=raises, **FEW)
    assert isinstance(told.value.__cause__, OwnError)
    assert world.lm.scheduler.live == 0
    assert world.lm.generate(PROMPT, **FEW).ids == expected


def test_nothing_is_saved_in_the_place_of_a_pipe_or_a_device(world: World, tmp_path: Path) -> None:
    pipe = odd_values(tmp_path).get("pipe", lambda: Path(os.devnull))()
    for save in (world.session.save, world.chat.save, new_key):
        with pytest.raises(InputError, match=r"is a pipe or a device|already exists"):
            save(pipe)
        assert pipe.exists()
        assert not pipe.is_file()


# --- readers at the same time, and use after the end ------------------------------------------------------------------
class Gate:
    """A processor of logits that stands still in its first step until it is let through."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def __call__(self, ids: object, logits: Any) -> Any:
        self.inside.set()
        assert self.open.wait(60)
        return logits


@pytest.mark.parametrize("several", [False, True])
def test_a_second_reader_of_a_stream_is_told_and_the_first_goes_on(world: World, several: bool) -> None:
    expected = world.lm.generate(PROMPT, max_new_tokens=4).ids
    gate = Gate()
    options: Any = {"max_new_tokens": 4, "logits_processor": gate}
    stream: Any = world.lm.stream_many([PROMPT], **options) if several else world.lm.stream(PROMPT, **options)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, stream)
        assert gate.inside.wait(60)
        try:
            with pytest.raises(InputError, match="is being read by another thread or task"):
                next(stream)
        finally:
            gate.open.set()
        chunks = [first.result(60), *stream]
    assert [token for chunk in chunks for token in (chunk[1] if several else chunk).ids] == expected


def test_a_second_task_that_reads_a_stream_is_told_and_the_first_goes_on(world: World) -> None:
    expected = world.lm.generate(PROMPT, max_new_tokens=4).ids

    async def run() -> list[int]:
        gate = Gate()
        stream = world.lm.astream(PROMPT, max_new_tokens=4, logits_processor=gate)
        first = asyncio.create_task(anext(stream))
        await asyncio.to_thread(gate.inside.wait, 60)
        try:
            with pytest.raises(InputError, match="is being read by another thread or task"):
                await anext(stream)
        finally:
            gate.open.set()
        chunks = [await first, *await read(stream)]
        return [token for chunk in chunks for token in chunk.ids]

    assert asyncio.run(run()) == expected


def test_a_stream_is_not_read_from_within(world: World) -> None:
    found: list[str] = []

    def within(ids: object, logits: Any) -> Any:
        try:
            next(stream)
        except InputError as error:
            found.append(str(error))
        return logits

    stream = world.lm.stream(PROMPT, logits_processor=within, **FEW)
    list(stream)
    assert len(found) == 2
    assert "by a callback of its own" in found[0]


def test_what_is_closed_says_so(world: World) -> None:
    closed = begun(world.bundle, world.folder)
    calls = {name: CALLS[name](closed) for name in CALLS if name.split(".")[0] in ("LanguageModel", "Session", "Chat")}
    streams = [closed.lm.stream(PROMPT), closed.lm.stream_many([PROMPT]), closed.session.stream(**FEW)]
    closed.lm.close()
    for _ in range(2):
        for name, (function, given) in calls.items():
            found = complaint(lambda: function(**given))  # noqa: B023 - is called at once
            assert found is None, f"{name}: {found}"
        for stream in streams:
            assert complaint(lambda: stream) is None  # noqa: B023
    with pytest.raises(InputError, match="this model is closed"):
        closed.lm.generate(PROMPT)
    world.session.fork().close()
    ended = world.session.fork()
    ended.close()
    for name in (name for name in CALLS if name.startswith("Session.")):
        function, given = CALLS[name](world)
        found = complaint(lambda: getattr(ended, name.split(".")[1])(**given))  # noqa: B023
        assert found is None, f"{name}: {found}"
    with pytest.raises(InputError, match="this session is closed"):
        ended.append("a")
