"""Bundles of a hostile author end in a sentence within the limits, and what their process can reach."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pastkey.contract import names
from pastkey.errors import InputError, LimitWarning, UntrustedBundleError
from pastkey.runtime.sandbox import child, landlock, process
from pastkey.runtime.sandbox.calls import call
from pastkey.runtime.sandbox.limits import Limits

from ...onnx_text import encode_model
from ..conftest import tiny_graph
from ..links import linked_to_blobs
from .conftest import EASY, has_ended, hooked

# 3 GB and as much again, folded when the graph is loaded.
LARGE_CONSTANT = """
    sizes = Constant <value_ints = [3, 268435456]> ()
    zero = Constant <value_float = 0.0> ()
    large = Expand(zero, sizes)
    less = Neg(large)
    least = ReduceMax <keepdims = 0> (less)
    nought = Cast <to = 7> (least)
    start = Add(logits_start, nought)
"""


def test_a_graph_that_takes_all_memory(hostile, tiny):
    text = tiny_graph(tiny, "fused", last_only=True).replace("start = Identity(logits_start)\n", LARGE_CONSTANT)
    folder = hostile(names.LAST_LOGITS_GRAPH, encode_model(text, tiny.weights)[0])
    with pytest.raises(UntrustedBundleError, match=r"has not the memory \(.*limits in force: 60 s for an answer"):
        call("generate", folder, {"prompt": "hello", "max_new_tokens": 3}, EASY, threads=1)


def test_a_tokenizer_that_fails_at_a_prompt(hostile, talking_bundle):
    """A panic in the library, at the limit of its retries."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content = json.loads((talking_bundle.path / names.TOKENIZER).read_text())
    folder = hostile(names.TOKENIZER, json.dumps(content | {"pre_tokenizer": split}).encode())
    with pytest.raises(InputError, match="the tokenizer fails at this text"):
        call("score", folder, {"text": "a" * 40 + "b"}, EASY)


BOMBS = {
    "{{ ('x' * 1000000000) | length }}": "has not the memory (",
    "{{ 7 ** (10 ** 8) }}": "gave no answer within 1.5 s, and was ended",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "gave no answer within 1.5 s",
}


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_that_asks_for_too_much(hostile, template):
    pytest.importorskip("jinja2")
    folder = hostile(names.TOKENIZER_CONFIG, json.dumps({"chat_template": template}).encode())
    limits = Limits(memory=400_000_000, seconds=1.5)
    with pytest.raises(UntrustedBundleError) as found:
        call("chat", folder, {"messages": [{"role": "user", "content": "Hi"}]}, limits, threads=1)
    assert BOMBS[template] in str(found.value)


# Run within the process, in place of what it was asked for.
SPIED = """
def tried(action):
    try: action()
    except OSError as error: return type(error).__name__
    except Exception as error: return repr(error)
    return 'done'
bundle = arguments.bundle
import pathlib, threading, onnxruntime
threads = [pathlib.Path(f'/proc/self/task/{t}/status').read_text() for t in os.listdir('/proc/self/task')]
print(json.dumps({'result': {
    'secret': tried(lambda: open(SECRET).read()),
    'users': tried(lambda: open('/etc/passwd').read()),
    'others': tried(lambda: os.listdir('/proc/1')),
    'bundle': tried(lambda: open(bundle + '/pastkey.json').read()),
    'write': tried(lambda: open(bundle + '/new', 'w')),
    'temporary': tried(lambda: open('/tmp/pastkey-test-file', 'w')),
    'start': tried(lambda: os.execv(sys.executable, [sys.executable, '-c', ''])),
    'connect': tried(lambda: socket.socket().connect(('127.0.0.1', PORT))),
    'bind': tried(lambda: socket.socket().bind(('127.0.0.1', PORT + 1))),
    'signal': tried(lambda: os.kill(os.getppid(), 0)),
    'fork': tried(lambda: os.fork() or os._exit(0)),
    'threads': [line for text in threads for line in text.splitlines() if line.startswith('NoNewPrivs')],
    'environment': sorted(os.environ),
}}))
"""


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no landlock, or a container denies it")
def test_what_it_can_reach(talking_bundle, tmp_path, monkeypatch, acting):
    """In every thread, whichever library has started it."""
    (tmp_path / "secret").write_text("x")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        acting(SPIED.replace("SECRET)", f"{str(tmp_path / 'secret')!r})").replace("PORT", str(port)))
        found = call("score", talking_bundle.path, {}, EASY)
    assert set(found.pop("threads")) == {"NoNewPrivs:\t1"}
    assert "SECRET_TOKEN" not in found.pop("environment")
    assert (found.pop("bundle"), found.pop("fork")) == ("done", "done")  # a copy of itself, which starts no program
    if not landlock.denies_tcp(landlock.abi()):
        del found["connect"], found["bind"]
    if landlock.abi() < 6:
        del found["signal"]
    assert set(found.values()) == {"PermissionError"}, found


def test_a_parent_that_dies_takes_it_along(talking_bundle):
    """Whatever it does: here it stands in a loop of native code that never looks up."""
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
from pastkey.runtime.sandbox import process
from pastkey.runtime.sandbox.calls import answer
from pastkey.runtime.sandbox.limits import Limits
from pastkey.runtime.sandbox.parent import LimitedProcess
hang = "import re\\nimport pastkey.runtime.sandbox.child as c\\n"
hang += "c.function_of = lambda name: lambda arguments: (c.command.progressed(), re.match('(a+)+$', 'a' * 60 + 'b'))\\n"
process.BOOT = process.BOOT.replace("from pastkey", hang + "from pastkey", 1).replace("; ", "\\n")
started = LimitedProcess(answer, {{}}, {str(talking_bundle.path)!r}, Limits(seconds=500.0))
started.next()
print(started._process.pid, flush=True)
started.next()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert has_ended(pid)


def test_a_folder_that_is_no_bundle_is_not_walked_through(talking_bundle):
    assert child._size_of(Path(os.sep)) == 0
    assert child._size_of(talking_bundle.path) > 100_000


def test_a_bundle_in_the_cache_of_a_hub(talking_bundle, tmp_path):
    snapshot = linked_to_blobs(talking_bundle.path, tmp_path)
    assert call("generate", snapshot, {"prompt": "ab", "max_new_tokens": 2}, EASY)["new_tokens"] == 2


def test_no_landlock_is_told(monkeypatch, talking_bundle):
    monkeypatch.setattr(process, "BOOT", hooked("import pastkey.runtime.sandbox.landlock as l\nl.abi = lambda: 0\n"))
    with pytest.warns(LimitWarning, match=r"files and networks are open to it \(no landlock\)"):
        call("score", talking_bundle.path, {"text": "ab"}, EASY)
