"""Bundles of a hostile author end in a sentence within the limits, and what their process can reach."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pastkey
from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, LimitWarning, MissingFileError, UntrustedBundleError
from pastkey.runtime.sandbox import child, landlock, process
from pastkey.runtime.sandbox.model import SandboxedModel

from .conftest import EASY, SMALL, has_ended, hooked, mend, opened


@pytest.mark.parametrize(
    ("graph", "limits", "words"),
    [("a loop", SMALL, "gave no answer within 1 s, and was ended"), ("a large constant", EASY, "has not the memory (")],
)
def test_a_graph_that_never_ends_or_takes_all_memory(hostile, graph, limits, words):
    with pytest.raises(UntrustedBundleError) as found, opened(hostile(graph), limits) as model:
        model.generate("hello", max_new_tokens=3)
    assert words in str(found.value)
    assert f"limits in force: {limits.seconds:g} s for an answer" in str(found.value)


def test_a_tokenizer_that_fails_at_a_prompt(hostile):
    """A panic in the library, at the limit of its retries: the process goes on."""
    folder = hostile("")
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content = json.loads((folder / names.TOKENIZER).read_text())
    (folder / names.TOKENIZER).write_text(json.dumps(content | {"pre_tokenizer": split}))
    mend(folder)
    with opened(folder) as model:
        with pytest.raises(InputError, match="the tokenizer fails at this text"):
            model.generate("a" * 40 + "b")
        assert model.generate([1, 2], max_new_tokens=2).new_tokens == 2


def test_a_template_that_asks_for_too_much(untrusted, tmp_path):
    """The process of the other tests lives on."""
    pytest.importorskip("jinja2")
    file = tmp_path / "template.jinja"
    file.write_text("{{ 'a' * n }}")
    with pytest.raises(InputError, match="does not take this conversation"):
        untrusted.chat_format(file).render([{"role": "user", "content": "Hi"}], n=10**9)
    assert untrusted.generate("ab", max_new_tokens=1).new_tokens == 1


# Run within the process, by a hook in place of a call.
SPIED = """
import json, os, socket, sys
from pathlib import Path
from pastkey.runtime.sandbox import server
def tried(action):
    try: action()
    except OSError as error: return type(error).__name__
    except Exception as error: return repr(error)
    return 'done'
def spy(self):
    secret, bundle, port = SECRET, str(self._path), PORT
    threads = [Path(f'/proc/self/task/{t}/status').read_text() for t in os.listdir('/proc/self/task')]
    return {
        'secret': tried(lambda: open(secret).read()),
        'users': tried(lambda: open('/etc/passwd').read()),
        'others': tried(lambda: os.listdir('/proc/1')),
        'bundle': tried(lambda: open(bundle + '/pastkey.json').read()),
        'write': tried(lambda: open(bundle + '/new', 'w')),
        'temporary': tried(lambda: open('/tmp/pastkey-test-file', 'w')),
        'start': tried(lambda: os.execv(sys.executable, [sys.executable, '-c', ''])),
        'connect': tried(lambda: socket.socket().connect(('127.0.0.1', port))),
        'signal': tried(lambda: os.kill(os.getppid(), 0)),
        'terminal': tried(lambda: open('/dev/tty')),
        'threads': [line for text in threads for line in text.splitlines() if line.startswith('NoNewPrivs')],
        'environment': sorted(os.environ),
    }
server.Server.do_defaults = spy
"""


@pytest.mark.skipif(not landlock.abi(), reason="this kernel has no landlock, or a container denies it")
def test_what_it_can_reach(talking_bundle, tmp_path, monkeypatch):
    """Once the bundle is open: in every thread, whichever library has started it."""
    (tmp_path / "secret").write_text("x")
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        spied = SPIED.replace("SECRET,", f"{str(tmp_path / 'secret')!r},").replace(
            "PORT", str(listening.getsockname()[1])
        )
        # Put in the place of a call when the server is imported, which is behind the limits.
        hook = f"import pastkey.runtime.sandbox.child as c, builtins\nspied = {spied!r}\n"
        hook += "real = c.rlimits.limit_memory\n"
        hook += "def limit(*a, final, **k):\n    if final: exec(spied, {})\n    return real(*a, final=final, **k)\n"
        hook += "c.rlimits.limit_memory = limit\n"
        monkeypatch.setattr(process, "BOOT", hooked(hook))
        with opened(talking_bundle.path) as model:
            found = model.connection.call("for a test", "defaults", dict[str, Any], {})
    assert set(found.pop("threads")) == {"NoNewPrivs:\t1"}
    assert "SECRET_TOKEN" not in found.pop("environment")
    assert found.pop("bundle") == "done"
    abi = landlock.abi()
    if not landlock.denies_tcp(abi):
        found.pop("connect")
    if abi < 6:
        found.pop("signal")
    found.pop("terminal")  # no terminal is there, which is another error
    assert set(found.values()) == {"PermissionError"}, found


def test_a_parent_that_dies_takes_it_along(hostile, tmp_path):
    """Whatever it does: here it stands in a loop of native code that never looks up."""
    program = f"""
import pastkey, sys, threading, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from pastkey.runtime.sandbox.limits import Limits
from pastkey.runtime.sandbox import process
hang = "import re\\nfrom pastkey.runtime.sandbox import server\\n"
hang += "server.Server.do_score = lambda self, text: re.match('(a+)+$', 'a' * 60 + 'b')\\n"
process.BOOT = process.BOOT.replace("from pastkey", hang + "from pastkey", 1).replace("; ", "\\n")
lm = pastkey.load({str(hostile(""))!r}, trust=False, limits=Limits(seconds=500.0))
print(lm.connection._process.pid, flush=True)
lm.score([1])
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert has_ended(pid)


def test_zip_files_are_unpacked_there(talking_bundle, tmp_path):
    file = tmp_path / "b.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for part in talking_bundle.path.rglob("*"):
            archive.write(part, f"b/{part.relative_to(talking_bundle.path)}")
    with opened(file.read_bytes()) as model:
        folder = model.path
        assert folder.is_dir()
        assert model.generate("ab", max_new_tokens=2).new_tokens == 2
    assert not folder.exists()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pastkey.json", "{}")
        archive.writestr("onnx/x", bytes(20_000_000))
    with pytest.raises(IntegrityError, match="would be unpacked to more than 20 times"):
        opened(file)


def test_what_is_no_bundle(tmp_path):
    with pytest.raises(MissingFileError, match="no such bundle: "):
        opened(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the bytes are not a zip file of a bundle folder"):
        opened(b"")


def test_a_folder_that_is_no_bundle_is_not_walked_through(talking_bundle):
    assert child._size_of(Path(os.sep)) == 0
    assert child._size_of(talking_bundle.path) > 100_000


def test_a_bundle_in_the_cache_of_a_hub(talking_bundle, tmp_path):
    """Whose files are links to a store beside it."""
    store = tmp_path / "models--a--b"
    snapshot = store / "snapshots" / "0123" / "bundle"
    (store / "blobs").mkdir(parents=True)
    for number, part in enumerate(sorted(talking_bundle.path.rglob("*"))):
        inner = part.relative_to(talking_bundle.path)
        if part.is_file():
            (snapshot / inner).parent.mkdir(parents=True, exist_ok=True)
            blob = store / "blobs" / f"{number:040x}"
            blob.write_bytes(part.read_bytes())
            (snapshot / inner).symlink_to(Path(*[".."] * (2 + len(inner.parts)), "blobs", blob.name))
    with opened(snapshot) as model:
        assert model.generate("ab", max_new_tokens=2).new_tokens == 2


def test_no_landlock_is_told(tmp_path, monkeypatch, talking_bundle):
    lacking = "import pastkey.runtime.sandbox.landlock as l\nl.abi = lambda: 0\n"
    monkeypatch.setattr(process, "BOOT", hooked(lacking))
    with pytest.warns(LimitWarning, match=r"files and networks are open to it \(no landlock\)"):
        model = pastkey.load(talking_bundle.path, trust=False, limits=EASY)
    assert isinstance(model, SandboxedModel)
    assert (model.limits.landlock, model.limits.missing[0]) == (0, "files and networks are open to it (no landlock)")
    model.close()


def test_a_signature_is_looked_at_there(hostile, tmp_path):
    pytest.importorskip("cryptography")
    from pastkey.runtime.model.signature import new_key, sign_bundle

    folder = hostile("")
    mine, other = new_key(tmp_path / "mine.pem"), new_key(tmp_path / "other.pem")
    sign_bundle(folder, tmp_path / "mine.pem")
    with opened(folder, key=mine) as model:
        assert model.generate("ab", max_new_tokens=1).new_tokens == 1
    with pytest.raises(IntegrityError, match="sign"):
        opened(folder, key=other)
