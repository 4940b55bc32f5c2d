"""The chats of examples/ in other languages: each answers as pastkey does, and the one in C++ is stopped by Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import pastkey
from benchmarks.environments import ROOT, environment
from pastkey.export import export

from ..shared import ran
from .environments import GENAI, had, node_environment

pytestmark = pytest.mark.slow

QUESTIONS = ("Zoë had 37", 'Tom had 2 "red')
NEW_TOKENS = 12
QUIET = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def talking(made_once, trained):
    """A float32 bundle with a chat template, which continues the conversation."""

    def make(folder: Path) -> None:
        template = folder / "chat.jinja"
        template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
        export(trained(preset="llama"), folder / "bundle", "fp32", chat_template=template)

    return made_once("talking", make) / "bundle"


@pytest.fixture(scope="module")
def endless(made_once):
    """The same of random weights and a context of 4,096 tokens: no text ends soon."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from ..export.tiny_llama import TEMPLATE, bpe, llama

    def make(folder: Path) -> None:
        llama(max_position_embeddings=4096).save_pretrained(folder / "model")
        tokenizer = bpe(bos=True)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / "model")
        export(folder / "model", folder / "bundle", "fp32")

    return made_once("endless", make) / "bundle"


def answers(bundle: Path) -> list[str]:
    chat = pastkey.load(bundle, "cpu").chat()
    return [chat.ask(question, max_new_tokens=NEW_TOKENS).text for question in QUESTIONS]


@pytest.fixture(scope="module")
def chat_in_cc(tmp_path_factory):
    """The program, linked as docs/apps.md says. Skips without a compiler, or where the package has other libraries."""
    compiler = had(shutil.which("g++"), "g++ is")
    folder = tmp_path_factory.mktemp("chat")
    site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(ran(environment(*GENAI), "-c", site).stdout.strip())
    genai = packages / "onnxruntime_genai" / "libonnxruntime-genai.so"
    runtime = [*(packages / "onnxruntime" / "capi").glob("libonnxruntime.so.1.*")]
    if not genai.exists() or len(runtime) != 1:
        pytest.skip("the package onnxruntime-genai has no libraries for this system")
    (folder / genai.name).symlink_to(genai)
    (folder / "libonnxruntime.so").symlink_to(runtime[0])
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        ROOT / "examples/genai/chat.cc",
        "-o",
        folder / "chat",
    ]
    ran(*command, "-L", folder, "-lonnxruntime-genai", f"-Wl,-rpath,{folder}")
    return folder / "chat"


def test_the_chat_in_cc_answers_as_pastkey_does(chat_in_cc, talking):
    told = ran(chat_in_cc, talking, NEW_TOKENS, input="\n".join(QUESTIONS), env=QUIET).stdout
    assert told.split() == " ".join(answers(talking)).split()


def test_ctrl_c_stops_an_answer_of_the_chat_in_cc_and_the_next_question_is_answered(chat_in_cc, endless):
    command = [chat_in_cc, endless, "2000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=QUIET) as chat:
        assert chat.stdin
        assert chat.stdout
        told = b""
        for question in QUESTIONS:
            chat.stdin.write(f"{question}\n".encode())
            chat.stdin.flush()
            told = chat.stdout.read(1)  # it has begun
            chat.send_signal(signal.SIGINT)
            while not told.endswith(b" (stopped)\n"):
                told += chat.stdout.read(1)
        chat.stdin.close()
        assert chat.wait(60) == 0


def test_a_mistake_of_the_chat_in_cc_is_one_sentence(chat_in_cc, tmp_path):
    done = subprocess.run([chat_in_cc, tmp_path], env=QUIET, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("chat: ")) == (2, True)


def test_the_chat_in_node_answers_as_pastkey_does(talking):
    folder = node_environment(Path(__file__).parent / "package.json")
    shutil.copy(ROOT / "examples" / "chat.mjs", folder)
    told = ran("node", folder / "chat.mjs", talking, NEW_TOKENS, input=QUESTIONS[0], env=QUIET).stdout
    assert told.split() == answers(talking)[0].split()
