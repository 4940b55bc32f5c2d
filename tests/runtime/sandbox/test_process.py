"""The process of an untrusted bundle: its start, its reach, and that its parent ends it in any case."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest

import pastkey
from pastkey.contract import names
from pastkey.errors import InputError, LimitWarning, UntrustedBundleError
from pastkey.runtime.sandbox import child, landlock, process
from pastkey.runtime.sandbox.calls import answer, call
from pastkey.runtime.sandbox.frames import END
from pastkey.runtime.sandbox.limits import Limits
from pastkey.runtime.sandbox.parent import LimitedProcess

from ...onnx_text import encode_model
from ..decoding.batching import waiting
from ..links import linked_to_blobs
from ..tiny_decoder import tiny_graph
from .conftest import EASY, hooked


def test_what_it_starts_with(monkeypatch, tmp_path):
    """No environment but what libraries need, no path but theirs, no terminal, not the folder where we are."""
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PASTKEY_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("print('mine')")
    shown = "import json, os, sys; alone = os.getsid(0) == os.getpid()\n"
    shown += "print(json.dumps([sorted(os.environ), sys.path, os.getcwd(), alone]))"
    monkeypatch.setattr(process, "BOOT", shown)
    started, lifeline = process.started("b")
    environment, paths, folder, alone = json.loads(started.communicate()[0])
    os.close(lifeline)  # type: ignore[arg-type]
    kept = ("OMP_", "OPENBLAS_", "MKL_", "RAYON_", "TOKENIZERS_", "LD_LIBRARY_PATH", "LANG", "LC_", "TZ")
    assert all(name.startswith((*kept, "ORT_DISABLE_TELEMETRY", "PASTKEY_NATIVE")) for name in environment)
    assert not {"", str(tmp_path)} & {*paths}
    assert (folder, alone) == (os.sep, True)


def test_libraries_are_found_and_no_more_is_read_than_they():
    roots, rights = process.libraries()
    assert Path(roots[0]) == Path(pastkey.__file__).resolve().parent.parent
    places = {Path(place) for place, _ in rights}
    assert any(place in Path(numpy.__file__).parents for place in places)
    assert {kind for _, kind in rights} <= {"read", "list"}
    assert not any(Path.home() == Path(place) and kind == "read" for place, kind in rights)


def test_a_package_beside_other_things_is_read_alone(tmp_path, monkeypatch):
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").touch()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "jinja2")
    monkeypatch.syspath_prepend(tmp_path)
    roots, rights = process.libraries()
    assert str(tmp_path) in roots
    assert [str(tmp_path), "list"] in rights
    assert [str(tmp_path / "jinja2"), "read"] in rights
    assert [str(tmp_path), "read"] not in rights


def test_without_a_python_to_start(monkeypatch):
    monkeypatch.setattr(process.sys, "executable", "")
    with pytest.raises(UntrustedBundleError, match="the untrusted bundle b needs a separate process"):
        process.started("b")
    monkeypatch.setattr(process.sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="/nowhere/python"):
        process.started("b")


# --- what it can do -----------------------------------------------------------------------------------------------
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
    with pytest.raises(UntrustedBundleError, match=r"has too little memory \(.*limits in force: 60 s for an answer"):
        call("generate", folder, {"prompt": "hello", "max_new_tokens": 3}, EASY, threads=1)


def test_a_tokenizer_that_fails_at_a_prompt(hostile, talking_bundle):
    """A panic in the library, at the limit of its retries."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content = json.loads((talking_bundle.path / names.TOKENIZER).read_text())
    folder = hostile(names.TOKENIZER, json.dumps(content | {"pre_tokenizer": split}).encode())
    with pytest.raises(InputError, match="the tokenizer fails at this text"):
        call("score", folder, {"text": "a" * 40 + "b"}, EASY)


BOMBS = {
    "{{ ('x' * 1000000000) | length }}": "has too little memory (",
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


# Run within the process, instead of its request.
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
    'users': tried(lambda: open('/etc/passwd').read()),
    'others': tried(lambda: os.listdir('/proc/1')),
    'bundle': tried(lambda: open(bundle + '/pastkey.json').read()),
    'write': tried(lambda: open('/tmp/pastkey-test-file', 'w')),
    'start': tried(lambda: os.execv(sys.executable, [sys.executable, '-c', ''])),
    'connect': tried(lambda: socket.socket().connect(('127.0.0.1', PORT))),
    'bind': tried(lambda: socket.socket().bind(('127.0.0.1', PORT + 1))),
    'signal': tried(lambda: os.kill(os.getppid(), 0)),
    'fork': tried(lambda: os.fork() or os._exit(0)),
    'threads': [line for text in threads for line in text.splitlines() if line.startswith('NoNewPrivs')],
}}))
"""


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no landlock, or a container denies it")
def test_what_it_can_reach(talking_bundle, acting):
    """In every thread, whichever library has started it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        acting(SPIED.replace("PORT", str(port)))
        found = call("score", talking_bundle.path, {}, EASY)
    assert set(found.pop("threads")) == {"NoNewPrivs:\t1"}
    assert (found.pop("bundle"), found.pop("fork")) == ("done", "done")  # a copy of itself, which starts no program
    if not landlock.denies_tcp(landlock.abi()):
        del found["connect"], found["bind"]
    if landlock.abi() < 6:
        del found["signal"]
    assert set(found.values()) == {"PermissionError"}, found


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_parent_that_dies_takes_it_along(talking_bundle):
    """Whatever it does: here it is in a loop of native code that checks nothing."""
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
    waiting.until(lambda: has_ended(pid))


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


# --- a hijacked process -------------------------------------------------------------------------------------------
LIMITS = Limits(seconds=20.0)


def children():
    """The processes that this one has started and that were not waited for."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ends
            found += (task / "children").read_text().split()
    return sorted(found)


@pytest.fixture
def nothing_is_left():
    """No descriptor, no thread, no process."""

    def held():
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()

    before = held()
    yield
    assert held() == before


def read(bundle, limits=LIMITS):
    """Reads a process to its end. Returns its exit status."""
    with LimitedProcess(answer, {"much": "x" * 1_000_000}, bundle, limits) as started:  # more than a pipe holds
        while started.next()[0] != END:
            pass
        return started.status()


ENDED = {
    "raw(b'no frame'); time.sleep(99)": "sent an invalid message, and was ended",
    "raw(b'o\\xff\\xff\\xff\\xff'); time.sleep(99)": "sent an invalid message, and was ended",
    "frame(b'<', b'a line'); time.sleep(99)": "sent an invalid message, and was ended",
    "frame(b'l', b'{}'); time.sleep(99)": "sent an invalid message",  # a second time
    "os.kill(os.getpid(), signal.SIGSEGV)": "was ended by SIGSEGV",
    f"os.kill(os.getpid(), {signal.SIGRTMIN + 5})": "was ended by signal ",
    "frames._target.close(); time.sleep(99)": "did not end after its last answer, and was ended",
    "time.sleep(99)": "gave no answer within 1 s, and was ended",
}


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("program", ENDED)
def test_a_process_that_does_not_answer_is_ended_with_a_sentence(acting, talking_bundle, program):
    acting(program)
    with pytest.raises(UntrustedBundleError) as found:
        read(talking_bundle.path, Limits(seconds=1.0) if program == "time.sleep(99)" else LIMITS)
    begin = f"the process of the untrusted bundle {talking_bundle.path} {ENDED[program]}"
    assert str(found.value).startswith(begin)
    assert "; limits in force: " in str(found.value)


@pytest.mark.usefixtures("nothing_is_left")
def test_what_it_started_ends_with_it(acting, talking_bundle, capfd):
    """Nobody waits for the pipe that its copy also holds."""
    acting("pid = os.fork()\nif pid: frame(b'o', str(pid).encode()); os._exit(4)\ntime.sleep(99)")
    with LimitedProcess(answer, {}, talking_bundle.path, Limits(seconds=1.0)) as started:
        kind, content = started.next()
        with pytest.raises(UntrustedBundleError, match="gave no answer within 1 s"):
            started.next()
    assert kind == b"o"
    waiting.until(lambda: has_ended(int(content)))


@pytest.mark.usefixtures("nothing_is_left")
def test_one_that_does_not_start_or_cannot_be_sent_what_was_given(monkeypatch, talking_bundle):
    with pytest.raises(TypeError, match="not JSON serializable"):
        LimitedProcess(answer, {"a": object()}, talking_bundle.path, LIMITS)
    monkeypatch.setattr(process, "BOOT", "raise SystemExit(1)")
    with pytest.raises(UntrustedBundleError, match="ended with status 1; limits in force: 20 s"):
        read(talking_bundle.path)
