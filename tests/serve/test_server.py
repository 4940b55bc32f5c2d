"""Before the model is loaded, and after the server was told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pastkey.runtime import load

from ..runtime.decoding.batching import waiting
from .conftest import COMPLETIONS, Served, running, write_tiny

BODY = {"prompt": "abc", "max_tokens": 4}


def test_while_the_model_is_loaded_the_status_is_503(bundle):
    go = threading.Event()

    def opened():
        go.wait(60)
        return load(bundle, threads=1)

    with running(opened) as served:
        for path, body in (("/health", None), ("/v1/models", None), (COMPLETIONS, BODY)):
            status, reply = served.ask(path, body)
            assert (status, reply["error"]["message"]) == (503, "Loading model")
        assert served.ask("/openapi.json")[0] == 200
        go.set()
        waiting.until(lambda: served.service.is_loaded)
        assert served.ask(COMPLETIONS, BODY)[0] == 200


def listens(served):
    try:
        served.ask("/health")
    except OSError:
        return False
    return True


def test_running_and_queued_requests_are_answered_before_the_end(gated, served):
    with gated(max_concurrency=1) as (ending, gate), ThreadPoolExecutor(2) as clients:
        found = [clients.submit(ending.choices, COMPLETIONS, **BODY) for _ in range(2)]
        waiting.until(lambda: ending.opened == 2)
        ending.server.should_exit = True
        waiting.until(lambda: not listens(ending))
        gate.release(100)
        assert [one.result() for one in found] == [served.choices(COMPLETIONS, **BODY)] * 2
    assert ending.model.closed


def test_after_its_time_the_end_comes_anyway(gated):
    body = {**BODY, "max_tokens": 500, "stream": True}
    with gated(drain_seconds=1) as (served, gate), served.response(COMPLETIONS, body) as response:
        gate.release(3)
        assert response.readline().startswith(b"data: ")
        served.server.should_exit = True
        waiting.until(lambda: served.model.activity.running == 0)
        gate.release(1000)
        assert b"[DONE]" not in response.read1(100_000)


def test_sigterm_ends_the_command_with_success(tmp_path):
    """And what is wrong with a chat template is told at the start."""
    authors, config = {"do_sample": True, "top_k": 5}, {"chat_template": "{% for %}"}
    bundle = write_tiny(tmp_path / "b", generation_config=authors, tokenizer_config=config)
    flags = ("--port", "0", "--threads", "1", "--alias", "a", "--default", "temperature=0")
    program = [sys.executable, "-m", "pastkey", "serve", bundle, *flags]
    environment = os.environ | {"PASTKEY_API_KEY": ""}
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        told = [process.stderr.readline() for _ in range(3)]
        served = Served(int(told[0].rsplit(":", 1)[1].split("/")[0]))
        waiting.until(lambda: served.ask("/health")[0] == 200)
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
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(number)
        try:
            assert process.wait(60) == status
        finally:
            process.kill()
        assert process.stdout.read() == b""
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_cannot_be_loaded_is_a_sentence(tmp_path, command):
    hot = write_tiny(tmp_path / "hot", generation_config={"do_sample": True, "top_p": 9})
    for bundle, said in ((tmp_path, "pastkey.json"), (hot, "generation_config.json is not valid: top_p is 9")):
        status, _, err = command("serve", bundle, "--port", 0, "--threads", 1)
        assert (status, err.count("\n"), "http://" in err) == (2, 1, False)
        assert err.startswith("pastkey serve: ")
        assert said in err
