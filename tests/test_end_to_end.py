"""text -> checkpoint/ -> bundle/ -> text, by the commands, and from a wheel where there is no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

import pastkey
from pastkey.__main__ import COMMANDS
from tools.wheel import build_wheel

Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture of conftest.py

ROOT = Path(__file__).parent.parent
PROMPTS = ("what is statquest", "statquest is what")


@pytest.mark.oldest
def test_the_classic_lesson_is_learnt_and_survives_int8(classic, pastkey_command):
    done = pastkey_command("run", classic / "bundle", "--prompt", PROMPTS[0], "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["finish_reason"], answer["new_tokens"]) == ("awesome", "stop", 1)
    lm = pastkey.load(classic / "bundle")
    assert [lm.generate(prompt).text for prompt in PROMPTS] == ["awesome", "awesome"]
    assert "".join(chunk.text for chunk in lm.stream(PROMPTS[0])) == "awesome"


@pytest.mark.oldest
@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain_onnxruntime_runs_the_exported_graph_in_a_loop_of_its_own(classic, prompt):
    bundle = classic / "bundle"
    session = onnxruntime.InferenceSession(bundle / "onnx" / "model_quantized.onnx", providers=["CPUExecutionProvider"])
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(prompt).ids
    past = {
        value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    answer: list[int] = []
    fed = 0
    while len(answer) < 3:
        new = (ids + answer)[fed:]
        feeds = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, fed + len(new)), np.int64),
            "position_ids": np.arange(fed, fed + len(new))[None],
        }
        logits, *present = session.run(None, feeds | past)
        past = dict(zip(past, present, strict=True))
        fed += len(new)
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] == ids[-1]:  # <EOS>
            break
    assert Tokenizer.from_file(str(bundle / "tokenizer.json")).decode(answer) == "awesome"


def test_an_uninstalled_checkout_works():
    """Without site-packages there is no editable install to lean on."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pastkey.runtime as r; print(r.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "runtime" / "__init__.py"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom pastkey.__main__ import COMMANDS, main\n"
        "for words in ([], *([command] for command in COMMANDS)):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'tokenizers', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout.count("usage: ") == len(COMMANDS) + 1


# --- the wheel ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("pastkey/") for name in files), files
    expected = {"pastkey/py.typed"} | {file.relative_to(ROOT).as_posix() for file in (ROOT / "pastkey").rglob("*.py")}
    for stage in ("train", "export", "runtime", "serve", "web", "see"):
        expected |= {f"pastkey/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / stage).rglob("*.py")}
    for folder in ("see/page", "web/page", "web/lib"):  # the last only after `make web-assets`
        expected |= {f"pastkey/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / folder).glob("*")}
    assert set(files) == expected


@pytest.mark.matrix  # CI installs the wheel for `make runtime-oldest` and `make runtime-newest`
def test_the_wheel_with_the_cpu_extra_is_a_working_runtime(wheel, classic, tmp_path):
    """In an environment without torch."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]"], check=True)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(classic / "bundle", elsewhere / "bundle")
    code = (
        "import importlib.util as u, pastkey\n"
        "print([m for m in ('torch', 'onnx', 'transformers') if u.find_spec(m)])\n"
        "lm = pastkey.load('bundle')\n"
        f"print([lm.generate(p).text for p in {PROMPTS!r}])\n"
    )
    done = subprocess.run([python, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "['awesome', 'awesome']"]
    command = tmp_path / "venv" / "bin" / "pastkey"
    done = subprocess.run([command, "inspect", "bundle"], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([command, "export", "x", "--out", "y"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "type  pip install torch onnx onnx-ir onnxscript safetensors " in done.stderr  # tqdm comes with tokenizers
    assert done.stderr.count("\n") == 1
