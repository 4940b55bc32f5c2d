"""Only an export of a model on the Hub asks for the network: nothing else makes a socket, or looks a name up."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import pytest

from .export.commands import FACTORY
from .shared import divided, ran

pytestmark = pytest.mark.slow

# Read by Python at its start: an attempt is written down, since the caller may catch the error.
REFUSING = """
import os, sys
def refuse(event, arguments):
    if event == "socket.__new__" and int(arguments[1]) == 1:
        return  # within this machine, as between threads of an event loop
    if event in ("socket.__new__", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        with open(os.environ["ATTEMPTS"], "a") as file:
            print(event, arguments, file=file)
        raise OSError(f"no network: {event}")
sys.addaudithook(refuse)
"""
INTERNET = re.compile(r"AF_INET|AF_PACKET|AF_NETLINK")


@pytest.fixture
def refused(tmp_path):
    """Runs Python where sockets are refused, and under strace where it is; standard output. Fails at an attempt."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(REFUSING)
    attempts, traced = tmp_path / "attempts", tmp_path / "traced"
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "ORT_DISABLE_TELEMETRY")

    def run(*arguments: object, stdin: str = "") -> str:
        environment = {name: value for name, value in os.environ.items() if name not in offline} | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "start"), *filter(None, sys.path)]),
            "ATTEMPTS": str(attempts),
        }
        strace = shutil.which("strace")
        watch = [strace, "-f", "-qq", "-e", "trace=socket,connect,sendto", "-o", str(traced)] if strace else []
        done = ran(*watch, sys.executable, *arguments, env=environment, input=stdin)
        assert not attempts.exists(), attempts.read_text()
        if strace:
            assert not INTERNET.search(traced.read_text()), traced.read_text()
        return done.stdout

    return run


def test_what_refuses_sees_an_attempt(refused):
    for code in ("socket.socket()", "socket.getaddrinfo('localhost', 80)"):
        with pytest.raises(AssertionError, match="socket"):
            refused("-c", f"import contextlib, socket\nwith contextlib.suppress(OSError): {code}")


def test_imports_a_load_a_text_and_a_conversation(refused, classic, tmp_path):
    refused("-c", "import pastkey, pastkey.runtime.model.language_model, pastkey.export.pipeline, pastkey.train.loop")
    bundle, template = classic / "bundle", tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}<EOS>{% endfor %}")
    assert refused("-m", "pastkey", "run", bundle, "--prompt", "what is statquest") == "awesome\n"
    asked = ("-m", "pastkey", "chat", bundle, "--template", template)
    assert "awesome" in refused(*asked, "--prompt", "what is statquest")
    assert "awesome" in refused(*asked, stdin="what is statquest\n")


@pytest.mark.parametrize("kind", divided(["module", "checkpoint", "huggingface"], ci=["module"]))
def test_an_export_and_its_verification(refused, classic, tmp_path, kind):
    source: object = classic / "checkpoint"
    if kind == "module":
        (tmp_path / "mine.py").write_text(FACTORY)
        source = f"{tmp_path}/mine.py:Small"
    elif kind == "huggingface":
        pytest.importorskip("transformers")
        from .export.tiny_llama import llama

        source = tmp_path / "llama"
        llama().save_pretrained(source)
    flags = ("--context", 12) if kind == "module" else ()
    refused("-m", "pastkey", "export", source, "--out", tmp_path / "bundle", "--precision", "fp32", *flags)
    refused("-m", "pastkey", "verify", tmp_path / "bundle", source)
    refused("-m", "pastkey", "run", tmp_path / "bundle", "--prompt-ids", "0,1")


def test_an_export_of_a_model_on_the_hub_is_what_asks(refused, tmp_path):
    pytest.importorskip("huggingface_hub")
    for arguments in (("export", "org/name", "--out", tmp_path / "bundle"), ("chat", "org/name", "--prompt", "Hello")):
        with pytest.raises(AssertionError, match=r"no model of this id could be fetched from huggingface\.co"):
            refused("-m", "pastkey", *arguments)
        (tmp_path / "attempts").unlink()


def test_the_other_commands_look_for_no_model_on_the_hub(refused, classic, tmp_path):
    pytest.importorskip("huggingface_hub")
    text, bundle = tmp_path / "text", classic / "bundle"
    text.write_text("what is statquest awesome " * 20)
    lines = ["bench org/name", "inspect org/name", "verify org/name", "batch org/name", f"eval org/name --text {text}"]
    lines += [f"verify {bundle} org/name", f"eval {bundle} --text {text} --reference org/name --length 4"]
    lines += [f"run {bundle} --prompt what --draft org/name", "export org/name --out bundle --no-network"]
    commands = [line.split() for line in lines]
    program = "import json, sys\nfrom pastkey.__main__ import main\nfor command in json.loads(sys.argv[1]):\n"
    program += "    try: print(main(command))\n    except SystemExit as end: print(end.code)"
    assert refused("-c", program, json.dumps(commands)).split() == ["2"] * len(commands)
