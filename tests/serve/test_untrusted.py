"""serve --untrusted: a process with limits serves, and its parent ends one without progress, whatever it reports."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from pastkey.serve.guard import salted

from ..runtime.decoding.batching import waiting
from ..runtime.sandbox import conftest as bundles
from .conftest import COMPLETIONS, Gate, Served, running

acting = bundles.acting


def test_a_bundle_is_served_from_a_process_with_limits(bundle, served, tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    flags = ("--untrusted", "--port", "0", "--api-key-file", tmp_path / "keys", "--alias", "tiny")
    command = [sys.executable, "-m", "pastkey", "serve", bundle, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, contextlib.ExitStack() as ending:
        ending.callback(server.terminate)
        port = next(found[1] for line in server.stderr if (found := re.search(r" at http://.*:(\d+)/v1$", line)))
        limited = Served(int(port), headers={"Authorization": "Bearer secret"})
        waiting.until(lambda: limited.ask("/health")[0] != 503)
        body = {"prompt": "hi", "max_tokens": 5, "temperature": 0}
        assert limited.choices(COMPLETIONS, **body) == served.choices(COMPLETIONS, **body)
        assert limited.ask(COMPLETIONS, body, Authorization="Bearer wrong")[0] == 401
        for page in ("/", "/index.html"):
            assert limited.ask(page)[0] == 404
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def test_a_hash_tells_no_key():
    assert salted(b"secret", "a") != salted(b"secret", "b") != salted(b"other", "b")


def test_a_reader_that_takes_nothing_makes_no_model_busy(bundle, monkeypatch):
    with running(bundle, untrusted=True) as server:
        unread = server.model.stream("hi", max_new_tokens=50)
        next(unread)
        steps = server.model.activity.steps
        assert server.ask("/health") == (200, {"status": "ok", "busy": False, "steps": steps})
        gate = Gate(server.model, monkeypatch)
        thread = threading.Thread(target=lambda: [*unread])
        thread.start()
        waiting.until(lambda: server.ask("/health")[1]["busy"])
        gate.release(100)
        thread.join()


# A server of the process, instead of the real one: `say(STATUS, BODY)` answers one question.
SERVING = """
listening = socket.socket(fileno=arguments.socket)
client, _ = listening.accept()
def say(status, body):
    client.recv(10_000)
    client.sendall(f'HTTP/1.1 {status} X\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}'.encode())
def health(**told): say(200, json.dumps({'status': 'ok', 'busy': False, 'steps': 0, **told}))
"""
LYING = {
    "health(); health(steps=10**9); time.sleep(99)": "gave no answer within 2 s",
    "health(busy=True); client.close(); time.sleep(99)": "gave no answer within 2 s",
    "while True: say(503, '{}')": "gave no answer within 2 s",
    "while True: health(busy=True, steps=7)": "made no step within 2 s",
    "while True: health(busy=-1)": "gave an invalid answer (busy is -1",
    "say(200, 'x' * 10**6); time.sleep(99)": "gave an invalid answer (health",
    "while True: print('x' * 10_000)": "printed more than 1,000,000 bytes",
    "os._exit(7)": "ended with status 7",
    "socket.create_server(('127.0.0.1', 0))": "Permission denied",
}


@pytest.mark.parametrize("program", LYING)
def test_what_it_says_of_itself_does_not_lengthen_its_life(command, bundle, acting, program):
    acting(SERVING + program)
    began = time.monotonic()
    status, out, err = command("serve", bundle, "--untrusted", "--port", "0", "--limit", "seconds=2")
    assert (status, out.strip("x\n")) == (2, "")
    assert LYING[program] in err
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("flags", [("--adapter", "a=b"), ("--draft", "b"), ("--provider", "cuda")])
def test_what_does_not_fit(command, bundle, flags):
    status, _, err = command("serve", bundle, "--untrusted", *flags)
    assert (status, f"{flags[0]} " in err) == (2, True)
