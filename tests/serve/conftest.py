"""A server in a thread of the tests, of a tiny decoder that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

for _package in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
    pytest.importorskip(_package)

from tokenizers import Tokenizer, decoders, models

from pastkey.runtime import LanguageModel, load
from pastkey.serve.command import listen
from pastkey.serve.server import Server, serve
from pastkey.serve.service import Service
from pastkey.serve.settings import ServerSettings

from ..runtime.conftest import E, Tiny, V, write_bundle
from ..runtime.decoding.batching import waiting

# 37 letters, for text, JSON and tool calls. In TEMPLATE's letters are the names of roles.
LETTERS = 'abcdefghilmnorstuwxy <>/_{}":,.1[]\nQZ'
TEMPLATE = (
    "{# <tool_call> #}{% for t in tools or [] %}{{ t.function.name }}.{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"
)
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "wet", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "wet", "arguments": {"a": 1}}</tool_call>'
RENDERED = "<user>hi.<assistant>"
Reply = tuple[int, Any]


def letters() -> Tokenizer:
    assert len(set(LETTERS)) == V
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A tiny decoder with a tokenizer, a chat template, and hidden states."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    tiny = Tiny.random([(8, 8)], context_length=600)
    config = {"chat_template": TEMPLATE}
    return write_bundle(folder, tiny, "fused", tokenizer=letters(), tokenizer_config=config, hidden_size=E).path


@pytest.fixture(scope="session")
def saying(tmp_path_factory):
    """A bundle that answers a rendering with a text, and then says Z, its EOS token."""

    def made(rendered: str, answer: str) -> Path:
        folder = tmp_path_factory.mktemp("saying") / "tiny"
        script = [0] * (len(rendered) - 1) + ids_of(answer + "Z")
        tiny = Tiny.random([(8, 8)], context_length=600).saying(script)
        config, eos = {"chat_template": TEMPLATE}, (LETTERS.index("Z"),)
        return write_bundle(folder, tiny, "fused", tokenizer=letters(), tokenizer_config=config, eos_token_ids=eos).path

    return made


@dataclass
class Served:
    """A running server, and a client of it."""

    port: int
    service: Service
    server: Server
    headers: dict[str, str] = field(default_factory=dict)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def response(self, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        client = self.connection()
        raw = body if isinstance(body, bytes | None) else json.dumps(body)
        client.request("GET" if body is None else "POST", path, raw, {"Connection": "close"} | self.headers | headers)
        return client.getresponse()

    def ask(self, path: str, body: Any = None, **headers: str) -> Reply:
        """The status and the JSON of a reply."""
        with contextlib.closing(self.response(path, body, **headers)) as response:
            return response.status, json.loads(response.read())

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of the events of a stream."""
        with contextlib.closing(self.response(path, {**body, "stream": True})) as response:
            assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            return list(data_of(response))

    @property
    def model(self) -> LanguageModel:
        return self.service.model


def data_of(response: http.client.HTTPResponse) -> Iterator[Any]:
    for line in response:
        if line.startswith(b"data: "):
            text = line.removeprefix(b"data: ").decode().strip()
            yield text if text == "[DONE]" else json.loads(text)


@contextlib.contextmanager
def running(bundle: Path | Callable[[], LanguageModel], **settings: Any) -> Iterator[Served]:
    """A server of a bundle on a free port of loopback, in a thread; a bundle is loaded by then."""
    defaults: dict[str, Any] = {"port": 0, "names": ("tiny",), "defaults": {"temperature": 0.0}}
    given = ServerSettings(**defaults | settings)
    begun: list[tuple[Server, Service]] = []

    def opened() -> LanguageModel:
        if not isinstance(bundle, Path):
            return bundle()
        return load(bundle, threads=1, max_batch=given.max_concurrency, max_queue=given.max_queue)

    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        work = serve(given, listening, opened, lambda server, service: begun.append((server, service)))
        thread = threading.Thread(target=asyncio.run, args=(work,))
        thread.start()
        try:
            waiting.until(lambda: bool(begun) and begun[0][0].started)
            server, service = begun[0]
            if isinstance(bundle, Path):
                waiting.until(lambda: service.is_loaded)
            yield Served(port, service, server)
        finally:
            begun[0][0].should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(bundle):
    with running(bundle) as found:
        yield found


@pytest.fixture(scope="session")
def calling(saying):
    """A server of a model that calls TOOL twice where it is said hi."""
    with running(saying("wet." + RENDERED, "so " + CALL + CALL)) as found:
        yield found


class Gate:
    """Lets a model run so many steps, and counts them."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran, self._steps = 0, threading.Semaphore(0)
        graph = lm.require_open().graph
        run = graph.run

        def gated(*arguments: Any) -> Any:
            self._steps.acquire()
            self.ran += 1
            return run(*arguments)

        monkeypatch.setattr(graph, "run", gated)

    def release(self, steps: int) -> None:
        self._steps.release(steps)
