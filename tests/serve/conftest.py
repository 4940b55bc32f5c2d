"""A server in a thread of the tests, of a tiny decoder that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

for _package in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
    pytest.importorskip(_package)

from tokenizers import Tokenizer, decoders, models

from pastkey.runtime import load
from pastkey.serve.command import listen
from pastkey.serve.server import serve
from pastkey.serve.settings import ServerSettings

from ..runtime.decoding.batching import waiting
from ..runtime.tiny_decoder import E, Tiny, V, write_bundle

# 37 letters, for text, JSON and tool calls. In TEMPLATE's letters are the names of roles.
LETTERS = 'abcdefghilmnorstuwxy <>/_{}":,.1[]\nQZ'
TEMPLATE = (
    "{# <tool_call> #}{% for t in tools or [] %}{{ t.function.name }}.{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}<assistant>"
)
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "wet", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "wet", "arguments": {"a": 1}}</tool_call>'
HI = [{"role": "user", "content": "hi"}]
RENDERED = "<user>hi.<assistant>"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def ids_of(text):
    return [LETTERS.index(letter) for letter in text]


def write_tiny(folder, tiny=None, **fields) -> Path:
    """A bundle with LETTERS and TEMPLATE, of a random decoder unless one is given. `fields`: see `write_bundle`.

    Where a `stand_in` is given, it is read for every letter that is none of LETTERS.
    """
    assert len(set(LETTERS)) == V
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=fields.pop("stand_in", None)))
    tokenizer.decoder = decoders.Fuse()
    given = {"tokenizer": tokenizer, "tokenizer_config": {"chat_template": TEMPLATE}} | fields
    return write_bundle(folder, tiny or Tiny.random([(8, 8)], context_length=600), "fused", **given).path


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("serve") / "tiny", hidden_size=E)


@pytest.fixture(scope="session")
def saying(tmp_path_factory):
    """A bundle that answers a rendering with a text, and then says Z, its EOS token."""

    def made(rendered, answer):
        tiny = Tiny.random([(8, 8)], context_length=600).saying([0] * (len(rendered) - 1) + ids_of(answer + "Z"))
        return write_tiny(tmp_path_factory.mktemp("saying") / "tiny", tiny, eos_token_ids=(LETTERS.index("Z"),))

    return made


@dataclass
class Served:
    """A running server, and a client of it."""

    port: int
    service: Any = None
    server: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def sent(self, path, body=None, method=None, **headers):
        """The connection of a request."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body)
        headers = {"Connection": "close"} | self.headers | headers
        client.request(method or ("GET" if body is None else "POST"), path, raw, headers)
        return client

    def response(self, path, body=None, method=None, **headers):
        return self.sent(path, body, method, **headers).getresponse()

    def ask(self, path, body=None, **headers):
        """The status and the JSON of a reply."""
        with contextlib.closing(self.response(path, body, **headers)) as response:
            return response.status, json.loads(response.read())

    def choices(self, path, **body):
        status, reply = self.ask(path, body)
        assert status == 200, reply
        return reply["choices"]

    def events(self, path, body):
        """The data of the events of a stream."""
        with contextlib.closing(self.response(path, {**body, "stream": True})) as response:
            assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            return list(data_of(response))

    @property
    def model(self):
        return self.service.model

    @property
    def opened(self):
        """How many requests run or wait."""
        return self.model.activity.running + self.model.activity.waiting


def data_of(response):
    for line in response:
        if line.startswith(b"data: "):
            text = line.removeprefix(b"data: ").decode().strip()
            yield text if text == "[DONE]" else json.loads(text)


@contextlib.contextmanager
def running(bundle, **settings):
    """A server of a bundle on a free port of loopback, in a thread; a bundle is loaded by then."""
    defaults: dict[str, Any] = {"port": 0, "names": ("tiny",), "defaults": {"temperature": 0.0}}
    given = ServerSettings(**defaults | settings)
    begun: list[Any] = []

    def opened():
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
            waiting.until(lambda: not isinstance(bundle, Path) or service.is_loaded)
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

    def __init__(self, lm, monkeypatch):
        self.ran, self._steps = 0, threading.Semaphore(0)
        self._run = lm.require_open().graph.run
        monkeypatch.setattr(lm.require_open().graph, "run", self._gated)

    def _gated(self, *arguments):
        self._steps.acquire()
        self.ran += 1
        return self._run(*arguments)

    def release(self, steps):
        self._steps.release(steps)


@pytest.fixture
def gated(bundle, monkeypatch):
    """gated(**SETTINGS): a server, and the gate of its model."""

    @contextlib.contextmanager
    def opened(**settings):
        with running(bundle, **settings) as served:
            yield served, Gate(served.model, monkeypatch)

    return opened
