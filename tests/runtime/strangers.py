"""What strangers give: odd values, every public callable of the runtime, and what may come of the two."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import pastkey.runtime
from pastkey.errors import PastkeyError
from pastkey.runtime import (
    Chat,
    Engine,
    Generation,
    LanguageModel,
    Limits,
    Request,
    SamplingConfig,
    Session,
    load,
    settings,
)
from pastkey.runtime.commands.bench import bench
from pastkey.runtime.commands.inspection import inspect as inspect_bundle
from pastkey.runtime.decoding.batching.cache_budget import CacheMemory
from pastkey.runtime.decoding.batching.prefix_cache import PrefixStore
from pastkey.runtime.decoding.many import StreamMany
from pastkey.runtime.model.signature import new_key, require_signature, sign_bundle

from .conftest import V

PROMPT = "once upon"
FEW: dict[str, Any] = {"max_new_tokens": 2}
LONGEST_SENTENCE, LONGEST_SECONDS = 700, 20  # characters; of a call


# --- odd values -------------------------------------------------------------------------------------------------------
class OwnError(Exception):
    """A mistake in what the caller gave to be called: it comes out as it is."""


class Silent:
    """What cannot be shown."""

    def __repr__(self) -> str:
        raise OwnError


def raises(*_: object) -> Any:
    raise OwnError


def nested(kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    value: Any = kind()
    for _ in range(10_000):
        value = [value] if kind is list else {"a": value}
    return value


SHOWN: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 1.5, float("nan"), float("inf"), -float("inf"), 1j, V, 2**63, 10**30, "", " ", "a",
    "\ud800", "a\0b", "true", "{}", b"", b"ab", [], (), {}, set(), [None], [1.5], [True], [-1], [V], [2**63], [1, 2],
    [[1, 2]], [[1], [2, 3]], [[]], ["a"], ["a", 1], [""], ["\ud800"], [b"a"], {"a": 1}, {1: "a"}, {1: float("nan")},
    {-1: 1.0}, {V: 1.0}, [{}], [{"role": "user", "content": "a"}], [{"type": "text"}], [{"function": {"name": "f"}}],
    [{"title": object}], int, len, range(3),
)  # fmt: skip
NAMED: dict[str, Any] = {
    "long text": "a" * 5000,
    "long path": "/" + "b" * 5000,
    "many digits": 10**5000,
    "many messages": [{"role": "user", "content": "a"}] * 10_000,
    "0-d": np.array(1),
    "0-d float": np.array(1.5),
    "empty array": np.array([]),
    "floats": np.array([1.5, 2.0]),
    "objects": np.array([1, "a", None], object),
    "2-d": np.array([[1, 2], [3, 4]]),
    "3-d": np.zeros((1, 1, 1), np.int64),
    "uint64": np.array([2**64 - 1], np.uint64),
    "texts": np.array(["a", "b"]),
    "bools": np.array([True, False]),
    "int64": np.int64(1),
    "float32": np.float32(1.5),
    "NaN of numpy": np.float32("nan"),
    "bool of numpy": np.bool_(True),
    "text of numpy": np.str_("a"),
    "an object": object(),
    "not to be shown": Silent(),
    "function that raises": raises,
}
FRESH: dict[str, Callable[[], Any]] = {
    "ids once": lambda: iter([1, 2]),
    "texts once": lambda: (text for text in ("a", "b")),
    "generator that raises": lambda: (raises() for _ in (1,)),
    "deep list": lambda: nested(list),
    "deep dict": lambda: nested(dict),
}
# Of an option that several calls parse in the same place, all but the first are given these.
SAME = ("None", "nan", "[1.5]", "many digits", "2-d", "deep list", "not to be shown")


def odd_values(folder: Path) -> dict[str, Callable[[], Any]]:
    """By a name for the report; each makes its value, since some can be read once only."""
    plain = {repr(value): value for value in SHOWN} | NAMED | {"folder": folder}
    if hasattr(os, "mkfifo"):
        plain["pipe"] = folder / "pipe"
        if not plain["pipe"].exists():
            os.mkfifo(plain["pipe"])
    return {name: lambda value=value: value for name, value in plain.items()} | FRESH


# --- what is called ---------------------------------------------------------------------------------------------------
@dataclass
class World:
    """A model, a text and a conversation of its own, and files."""

    lm: LanguageModel
    session: Session
    chat: Chat
    bundle: Path
    folder: Path

    def engine(self) -> Engine:
        """With three tokens."""
        engine = self.lm.new_engine()
        engine.prefill([1, 2, 3])
        return engine

    def generation(self, **given: Any) -> Generation:
        return Generation(self.lm.new_engine(), Request(**given))


def begun(bundle: Path, folder: Path) -> World:
    lm = load(bundle, threads=1)
    world = World(lm, lm.session(), lm.chat(), bundle, folder)
    world.session.append(PROMPT)
    world.chat.ask("abc", **FEW)
    return world


def asked(world: World) -> Chat:
    """A conversation whose last question waits for its answer."""
    chat = world.lm.chat()
    chat.messages = [{"role": "user", "content": "abc"}]
    return chat


# What is called, and with what beside the odd value.
CALLS: dict[str, Callable[[World], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "load": lambda w: (load, {"path": w.bundle, "threads": 1}),
    "bench": lambda w: (bench, {"path": w.bundle, "prompt_tokens": 2, "new_tokens": 1, "threads": 1}),
    "inspect": lambda w: (inspect_bundle, {"path": w.bundle, "threads": 1}),
    "sign_bundle": lambda w: (sign_bundle, {"bundle": w.bundle, "key": w.folder / "key.pem"}),
    "require_signature": lambda w: (require_signature, {"bundle": w.bundle, "key": w.folder / "key.pub.pem"}),
    "new_key": lambda w: (new_key, {"path": w.folder / "key.pem"}),
    "SamplingConfig": lambda w: (SamplingConfig, {}),
    "Limits": lambda w: (Limits, {}),
    "LanguageModel.generate": lambda w: (w.lm.generate, {"prompt": PROMPT, **FEW}),
    "LanguageModel.stream": lambda w: (w.lm.stream, {"prompt": PROMPT, **FEW}),
    "LanguageModel.stream_many": lambda w: (w.lm.stream_many, {"prompts": [PROMPT], **FEW}),
    "LanguageModel.astream": lambda w: (w.lm.astream, {"prompt": PROMPT, **FEW}),
    "LanguageModel.agenerate": lambda w: (w.lm.agenerate, {"prompt": PROMPT, **FEW}),
    "LanguageModel.session": lambda w: (w.lm.session, {}),
    "LanguageModel.load_session": lambda w: (w.lm.load_session, {"path": w.folder / "session"}),
    "LanguageModel.chat": lambda w: (w.lm.chat, {}),
    "LanguageModel.logits": lambda w: (w.lm.logits, {"ids": [1, 2]}),
    "LanguageModel.score": lambda w: (w.lm.score, {"text": "abc"}),
    "LanguageModel.embed": lambda w: (w.lm.embed, {"text": "abc"}),
    "LanguageModel.prompt_ids": lambda w: (w.lm.prompt_ids, {"prompt": "abc"}),
    "LanguageModel.new_engine": lambda w: (w.lm.new_engine, {}),
    "LanguageModel.require_open": lambda w: (w.lm.require_open, {}),
    "Session.append": lambda w: (w.session.fork().append, {"text": "abc"}),
    "Session.generate": lambda w: (w.session.fork().generate, {"text": "abc", **FEW}),
    "Session.stream": lambda w: (w.session.fork().stream, {"text": "abc", **FEW}),
    "Session.keep": lambda w: (w.session.fork().keep, {"prompt": "abc"}),
    "Session.trim": lambda w: (w.session.fork().trim, {"length": 1}),
    "Session.fork": lambda w: (w.session.fork, {}),
    "Session.save": lambda w: (w.session.save, {"path": w.folder / "session"}),
    "Session.cancel": lambda w: (w.session.fork().cancel, {}),
    "Session.close": lambda w: (w.session.fork().close, {}),
    "Chat.reset": lambda w: (asked(w).reset, {}),
    "Chat.ask": lambda w: (w.lm.chat().ask, {"text": "abc", **FEW}),
    "Chat.stream": lambda w: (w.lm.chat().stream, {"text": "abc", **FEW}),
    "Chat.aask": lambda w: (w.lm.chat().aask, {"text": "abc", **FEW}),
    "Chat.astream": lambda w: (w.lm.chat().astream, {"text": "abc", **FEW}),
    "AnswerStream.send": lambda w: (w.lm.chat().stream("abc", **FEW).send, {"value": None}),
    "Chat.prompt_ids": lambda w: (asked(w).prompt_ids, {}),
    "Chat.take_answer": lambda w: (asked(w).take_answer, {"answer": w.lm.generate("abc", **FEW)}),
    "Chat.add_tool_result": lambda w: (w.lm.chat().add_tool_result, {"content": "abc", "name": "f"}),
    "Chat.undo": lambda w: (asked(w).undo, {}),
    "Chat.drop": lambda w: (asked(w).drop, {}),
    "Chat.set_system": lambda w: (asked(w).set_system, {"system": "abc"}),
    "Chat.save": lambda w: (w.chat.save, {"path": w.folder / "chat.json"}),
    "Chat.load": lambda w: (w.lm.chat().load, {"path": w.folder / "chat.json"}),
    "Stream.send": lambda w: (w.lm.stream("abc", **FEW).send, {"value": None}),
    "StreamMany.send": lambda w: (w.lm.stream_many(["abc"], **FEW).send, {"value": None}),
    "AsyncStream.asend": lambda w: (w.lm.astream("abc", **FEW).asend, {"value": None}),
    "AsyncStream.completed": lambda w: (w.lm.astream("abc", **FEW).completed, {}),
    "Generator": lambda w: (pastkey.Generator, {"bundle": w.bundle, "threads": 1, **FEW}),
    "Generator.__call__": lambda w: (pastkey.Generator(w.bundle, threads=1), {"batch": {"prompt": ["abc"]}}),
    "Generator.close": lambda w: (pastkey.Generator(w.bundle, threads=1).close, {}),
    "CacheMemory.estimate": lambda w: (w.lm.memory.estimate, {"tokens": 1}),
    "PrefixStore.clear": lambda w: (w.lm.scheduler.store.clear, {}),
    "Generation": lambda w: (w.generation, {"prompt": [1, 2], **FEW}),
    "Generation.cancel": lambda w: (w.generation(prompt=[1], **FEW).cancel, {}),
    "Generation.close": lambda w: (w.generation(prompt=[1], **FEW).close, {}),
    "Engine.reset": lambda w: (w.engine().reset, {}),
    "Engine.prefill": lambda w: (w.engine().prefill, {"ids": [1, 2]}),
    "Engine.append": lambda w: (w.engine().append, {"ids": [1, 2]}),
    "Engine.extend": lambda w: (w.engine().extend, {"ids": [1]}),
    "Engine.all_logits": lambda w: (w.engine().all_logits, {"ids": [1, 2]}),
    "Engine.decode": lambda w: (w.engine().decode, {"token": 1}),
    "Engine.forward": lambda w: (w.engine().forward, {"ids": [[1, 2]]}),
    "Engine.hidden_states": lambda w: (w.engine().hidden_states, {"ids": [[1, 2]]}),
    "Engine.checked": lambda w: (w.engine().checked, {"ids": [1], "ndim": 1}),
    "Engine.shared_with": lambda w: (w.engine().shared_with, {"ids": [1, 2, 3]}),
    "Engine.chunk_sizes": lambda w: (w.engine().chunk_sizes, {"tokens": 3}),
    "Engine.keep_prefix": lambda w: (w.engine().keep_prefix, {"ids": [1, 2, 3]}),
    "Engine.trim": lambda w: (w.engine().trim, {"length": 1}),
    "Engine.copy": lambda w: (w.engine().copy, {}),
}
SURFACE = [value for name in dir(pastkey.runtime) if inspect.isclass(value := getattr(pastkey.runtime, name))]
SURFACE += [StreamMany, CacheMemory, PrefixStore]
LEFT_OUT = {
    "is what other classes of the runtime call, with what they have checked": (
        "SamplingConfig.of Engine.over Engine.empty Engine.can_trim Engine.restore Engine.shift Engine.leave_window "
        "Engine.reserve "
        "Engine.note_batched Generation.fail Generation.begin Generation.step Generation.retire "
        "Engine.drop_cache Engine.run Generation.jump Generation.make_ready Generation.require_ownership "
        "Generation.restart "
        "Generation.take Generation.take_together Generator.answers PrefixStore.take PrefixStore.put "
        "Chat.taken_in PrefixStore.nearest PrefixStore.shrink CacheMemory.promise CacheMemory.release"
    ),
    "is Python's own protocol of generators, which takes an error to be raised": (
        "Stream.throw StreamMany.throw AsyncStream.athrow AnswerStream.throw"
    ),
    "takes nothing, and ends what every row has used": (
        "LanguageModel.close AnswerStream.cancel AnswerStream.close "
        "Stream.cancel Stream.close StreamMany.cancel StreamMany.close AsyncStream.cancel "
        "AsyncStream.aclose"
    ),
    "sends what it is given to a process, which calls those above": (
        "SandboxedModel.generate SandboxedModel.agenerate SandboxedModel.stream SandboxedModel.astream "
        "SandboxedModel.score SandboxedModel.ascore SandboxedModel.chat SandboxedModel.chat_format "
        "SandboxedModel.close SandboxedStream.send SandboxedStream.throw "
        "SandboxedStream.cancel SandboxedStream.close"
    ),
    "has the row of Chat, which calls it": "LanguageModel.chat_format",
}
# Parameters that take objects of the runtime, or whose values another call has checked.
OWN_OBJECTS = {
    "Engine.checked": {"ndim", "start"},
    "Engine.chunk_sizes": {"tokens"},
    "Engine.copy": {"room"},
    "Engine.keep_prefix": {"exact"},
}


# --- what comes of it -------------------------------------------------------------------------------------------------
def parameters(name: str, function: Callable[..., Any]) -> dict[str, bool]:
    """Those that are values, and whether each is an option that other calls parse in the same place."""
    if name == "Generation":
        known = ("prompt", "max_new_tokens", "timeout", "logprobs", "context_overflow", "num_sink_tokens")
        return dict.fromkeys(known, False)
    found: dict[str, bool] = {}
    for parameter in inspect.signature(function).parameters.values():
        options = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
        if options is not None:
            shared = name not in ("LanguageModel.generate", "inspect")
            found |= dict.fromkeys(sorted(getattr(settings, options[1]).__optional_keys__), shared)
        elif parameter.name not in OWN_OBJECTS.get(name, ()):
            found[parameter.name] = False
    return found


def consumed(value: Any) -> None:
    """Reads what is read step by step, and closes what is open."""
    if inspect.isawaitable(value):
        asyncio.run(awaited(value))
    elif isinstance(value, AsyncGenerator):
        asyncio.run(read(value))
    elif isinstance(value, Generator | Generation):
        for _ in value:
            pass
    elif isinstance(value, LanguageModel | Session):
        value.close()


async def awaited(value: Any) -> Any:
    return await value


async def read(stream: AsyncGenerator[Any, None]) -> list[Any]:
    return [chunk async for chunk in stream]


def complaint(call: Callable[[], Any], *, own: bool = False) -> str | None:
    """What is wrong with how a call ended. `own`: an OwnError may come out."""
    start = time.monotonic()
    try:
        consumed(call())
    except PastkeyError as error:
        text = str(error)
        if not text or "\n" in text or len(text) > LONGEST_SENTENCE:
            return f"no sentence: {text!r:.200}"
    except OwnError:
        return None if own else "raised what a value raised that is only to be shown"
    except StopIteration:  # what `send` says at the end
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.200}"
    seconds = time.monotonic() - start
    return None if seconds < LONGEST_SECONDS else f"took {seconds:.0f} s"


def complaints(world: World, name: str, folder: Path) -> Iterator[str]:
    def state() -> list[Any]:
        with world.session.fork() as fork:
            said = fork.generate(max_new_tokens=6).ids
        return [world.lm.generate(PROMPT, max_new_tokens=6).ids, said, world.session.ids]

    expected, values = state(), odd_values(folder)
    for parameter, shared in parameters(name, CALLS[name](world)[0]).items():
        for label in SAME if shared else values:
            if (name, parameter, label) == ("load", "trust", "False"):
                continue  # which is none of the odd values, and starts a process
            function, given = CALLS[name](world)
            given = {**given, parameter: values[label]()}
            found = complaint(lambda: function(**given), own="raises" in label)  # noqa: B023 - is called at once
            if found is not None:
                yield f"{name}({parameter}=<{label}>): {found}"
        if state() != expected:
            yield f"{name}({parameter}=...): leaves another state"


def public(surface: Iterable[type]) -> Iterator[str]:
    for kind in surface:
        for name, value in vars(kind).items():
            is_method = inspect.isfunction(value) or isinstance(value, classmethod | staticmethod)
            if is_method and (not name.startswith("_") or name == "__call__"):
                yield f"{kind.__name__}.{name}"
