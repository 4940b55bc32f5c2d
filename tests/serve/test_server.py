"""Before the model is loaded, and after the server was told to end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pastkey.runtime import LanguageModel, load

from ..runtime.conftest import Tiny, write_bundle
from ..runtime.decoding.batching import waiting
from .conftest import Gate, Served, letters, running

BODY = {"prompt": "abc", "max_tokens": 4}


def test_while_the_model_is_loaded_the_status_is_503(bundle):
    go = threading.Event()

    def opened() -> LanguageModel:
        go.wait(60)
        return load(bundle, threads=1)

    with running(opened) as served:
        for path, body in (("/health", None), ("/v1/models", None), ("/v1/completions", BODY)):
            status, reply = served.ask(path, body)
            assert (status, reply["error"]["message"]) == (503, "Loading model")
        assert served.ask("/openapi.json")[0] == 200
        go.set()
        waiting.until(lambda: served.service.is_loaded)
        assert served.ask("/v1/completions", BODY)[0] == 200


def test_running_and_queued_requests_are_answered_before_the_end(bundle, monkeypatch):
    with running(bundle, max_concurrency=1) as served, ThreadPoolExecutor(2) as clients:
        model = served.model
        text = model.generate("abc", max_new_tokens=4).text
        gate = Gate(model, monkeypatch)
        found = [clients.submit(served.ask, "/v1/completions", BODY) for _ in range(2)]
        waiting.until(lambda: model.activity.running + model.activity.waiting == 2)
        served.server.should_exit = True
        waiting.until(lambda: not listens(served))
        gate.release(100)
        assert [one.result()[1]["choices"][0]["text"] for one in found] == [text] * 2
    assert model.closed


def test_after_its_time_the_end_comes_anyway(bundle, monkeypatch):
    with running(bundle, drain_seconds=1) as served:
        gate = Gate(served.model, monkeypatch)
        with served.response("/v1/completions", {**BODY, "max_tokens": 500, "stream": True}) as response:
            gate.release(3)
            assert response.readline().startswith(b"data: ")
            served.server.should_exit = True
            waiting.until(lambda: served.model.activity.running == 0)
            gate.release(1000)
            assert b"[DONE]" not in response.read1(100_000)


def listens(served: Served) -> bool:
    try:
        served.ask("/health")
    except OSError:
        return False
    return True


def test_sigterm_ends_the_command_with_success(tmp_path):
    """And what is wrong with a chat template is told at the start."""
    authors, config = {"do_sample": True, "top_k": 5}, {"chat_template": "{% for %}"}
    tiny, files = Tiny.random([(8, 8)], context_length=99), {"tokenizer": letters(), "tokenizer_config": config}
    bundle = write_bundle(tmp_path / "b", tiny, "fused", generation_config=authors, **files)
    flags = ("--port", "0", "--threads", "1", "--alias", "a", "--default", "temperature=0")
    program = [sys.executable, "-m", "pastkey", "serve", str(bundle.path), *flags]
    environment = os.environ | {"PASTKEY_API_KEY": ""}
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        told = [process.stderr.readline() for _ in range(3)]
        port = int(told[0].rsplit(":", 1)[1].split("/")[0])

        def ready() -> bool:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            client.request("GET", "/health", headers={"Connection": "close"})
            return bool(json.loads(client.getresponse().read()).get("status") == "ok")

        waiting.until(ready)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    assert told[0].startswith("pastkey serve: a at http://127.0.0.1:")
    assert told[1] == "pastkey serve: defaults of the model's generation_config.json: temperature 1.0, top_k 5\n"
    assert "conversations will be refused: the chat template is not valid Jinja" in told[2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_server_that_still_loads(number, status, tmp_path):
    program = f"""if True:
        import tempfile, time
        from pastkey.runtime.model.unpack import TemporaryFolder
        from pastkey.serve.command import listen
        from pastkey.serve.server import run
        from pastkey.serve.settings import ServerSettings

        def load():
            unpacked = TemporaryFolder()
            print("loading", flush=True)
            time.sleep(600)

        tempfile.tempdir = {str(tmp_path)!r}
        run(ServerSettings(port=0), listen("127.0.0.1", 0), load)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(number)
        try:
            assert process.wait(60) == status
        finally:
            process.kill()
        assert process.stdout.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_be_loaded_is_a_sentence(tmp_path, command):
    wrong = {"do_sample": True, "top_p": 9}
    hot = write_bundle(tmp_path / "hot", Tiny.random([(8, 8)], context_length=99), "fused", generation_config=wrong)
    for bundle, said in ((tmp_path, "pastkey.json"), (hot.path, "generation_config.json is not valid: top_p is 9")):
        status, _, err = command("serve", bundle, "--port", 0, "--threads", 1)
        assert (status, err.count("\n"), "http://" in err) == (2, 1, False)
        assert err.startswith("pastkey serve: ")
        assert said in err


def test_a_template_that_writes_too_much_is_refused_and_the_server_goes_on(tmp_path):
    tiny, config = Tiny.random([(8, 8)], context_length=600), {"chat_template": "{{ 'x' * 5000000 }}"}
    bundle = write_bundle(tmp_path / "b", tiny, "fused", tokenizer=letters(), tokenizer_config=config).path
    with running(bundle) as served:
        status, reply = served.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
        assert status == 400
        assert "it writes more than 4,000,000 characters" in reply["error"]["message"]
        assert served.ask("/v1/completions", BODY)[0] == 200
