"""Before the model is loaded, and after the server was told to end; the commands and the program of docs/serve.md."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pastkey.runtime import load
from pastkey.serve.api import schemas
from pastkey.serve.app import TABLE
from pastkey.serve.events import ahead

from ..runtime.conftest import runs_of
from ..runtime.decoding.batching import waiting
from .conftest import COMPLETIONS, Served, data_of, running, write_tiny

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
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
    """And the fault of a chat template is printed at the start."""
    authors, config = {"do_sample": True, "top_k": 5}, {"chat_template": "{% for %}"}
    bundle = write_tiny(tmp_path / "b", generation_config=authors, tokenizer_config=config)
    flags = ("--port", "0", "--threads", "1", "--alias", "a", "--default", "temperature=0")
    program = [sys.executable, "-m", "pastkey", "serve", str(bundle), *flags]
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
    assert "conversations will be rejected: the chat template is not valid Jinja" in told[2]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_server_that_still_loads(number, status, tmp_path):
    program = f"""
import tempfile, time
from pastkey.runtime.model.unpack import TemporaryFolder
from pastkey.serve import command, server, settings

def load():
    unpacked = TemporaryFolder()
    print("loading", flush=True)
    time.sleep(600)

tempfile.tempdir = {str(tmp_path)!r}
server.run(settings.ServerSettings(port=0), command.listen("127.0.0.1", 0), load)
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


# --- docs/serve.md --------------------------------------------------------------------------------------------------
def test_the_command_and_the_program_of_the_page_run(tmp_path):
    pytest.importorskip("openai")
    (program,) = re.findall(r"^```py\n(import os\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^    (curl (?:.*\\\n)?.*)$", PAGE, re.MULTILINE)
    patient = write_tiny(tmp_path / "bundle", stand_in="Q")  # reads every letter
    with running(patient, names=("bundle",), defaults={"max_new_tokens": 8}) as served:
        address = f"127.0.0.1:{served.port}"
        if shutil.which("curl") is not None:
            asked = ["bash", "-c", command.replace("127.0.0.1:8080", address)]
            told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
            assert '"object":"chat.completion"' in told
        environment = os.environ | {"OPENAI_BASE_URL": f"http://{address}/v1"}
        asked = [sys.executable, "-c", program]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) == 64 + 1 + 64  # the answer, a line break, the streamed answer


def test_the_page_names_every_route_and_field():
    for entry in TABLE:
        assert re.sub(r"{.*}", "NAME", entry.path) in PAGE
    for name in schemas.ModelBody.model_fields:
        assert f"`{name}`" in PAGE


# --- load: the queue, its order, and clients that go away, each with real sockets -----------------------------------
def body(prompt, tokens=20, **more):
    return {"prompt": prompt, "max_tokens": tokens, **more}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_text_within_a_step(gated, stream):
    with gated() as (served, gate):
        gate.release(5)
        client = served.sent(COMPLETIONS, body("abc", 500, stream=stream))
        waiting.until(lambda: gate.ran == 5)
        client.close()
        waiting.until(lambda: served.opened == 0)
        gate.release(100)
        waiting.until(lambda: served.model.scheduler.live == 0)
        assert gate.ran <= 6
        assert served.ask(COMPLETIONS, body("abc", 3))[0] == 200


def test_a_full_queue_is_a_429_and_a_queued_client_that_leaves_frees_its_place_and_no_others(gated):
    with gated(max_concurrency=1, max_queue=2) as (served, gate):
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(served.choices, COMPLETIONS, **body("abc"))
            waiting.until(lambda: served.opened == 1)
            leaver = served.sent(COMPLETIONS, body("lmn", 400, stream=True))
            waiting.until(lambda: served.opened == 2)
            last = clients.submit(served.choices, COMPLETIONS, **body("de"))
            waiting.until(lambda: served.opened == 3)
            with served.response(COMPLETIONS, body("x")) as refused:
                assert (refused.status, refused.headers["retry-after"]) == (429, "1")
                assert json.loads(refused.read())["error"]["code"] == "queue_full"
            assert served.ask("/health")[0] == 200
            leaver.close()
            waiting.until(lambda: served.opened == 2)
            gate.release(10_000)
            texts = [found.result()[0]["text"] for found in (first, last)]
        assert served.model.activity.requests == 2  # the leaver never began
        assert texts == [served.model.generate(prompt, max_new_tokens=20).text for prompt in ("abc", "de")]


def test_a_reader_that_takes_nothing_holds_no_place(bundle):
    long = body("abc", 590, stream=True)  # its events are more than a socket's buffers hold
    with running(bundle, max_concurrency=1) as served, served.response(COMPLETIONS, long) as response:
        waiting.until(lambda: served.model.activity.requests == 1)
        assert served.ask(COMPLETIONS, body("abc", 3))[0] == 200
        *chunks, done = data_of(response)
    assert (done, len(chunks) > 500) == ("[DONE]", True)


def test_a_long_prefill_sends_pings(gated):
    asked = body("abc", 2, stream=True)
    with gated(ping_seconds=0.05) as (served, gate), served.response(COMPLETIONS, asked) as response:
        assert [response.readline() for _ in range(3)] == [b": ping\n", b"\n", b": ping\n"]
        gate.release(100)
        assert list(data_of(response))[-1] == "[DONE]"


def test_the_time_of_a_request_ends_its_text(bundle, monkeypatch):
    with running(bundle, timeout=0.2) as served:
        runs_of(served.model.require_open().graph, monkeypatch, 0.01)
        reply = served.ask(COMPLETIONS, body("abc", 500))[1]
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] < 500


def test_one_request_with_many_prompts_is_never_cut_by_the_queue(bundle):
    with running(bundle, max_concurrency=2, max_queue=0) as served:
        choices = served.choices(COMPLETIONS, prompt=["ab"] * 9, max_tokens=2, n=2)
        assert [choice["index"] for choice in choices] == list(range(18))
        assert served.opened == 0


async def cancelled(take):
    take(1)
    raise asyncio.CancelledError


def test_an_answer_whose_source_is_cancelled_ends():
    async def read():
        return [item async for item in ahead(cancelled, 0.1)]

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(read(), 5))
