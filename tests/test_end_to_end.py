"""text -> checkpoint/ -> bundle/ -> text, by the commands, and from a wheel where there is no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
import zipfile

import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

import pastkey
from pastkey.__main__ import COMMANDS
from tools.wheel import build_wheel

from .shared import ROOT, ran

STAGES = ("train", "export", "runtime", "serve", "web", "see")
PROMPTS = ("what is statquest", "statquest is what")


@pytest.mark.oldest
def test_the_classic_lesson_is_learnt_and_survives_int8(classic, pastkey_command):
    answer = json.loads(pastkey_command("run", classic / "bundle", "--prompt", PROMPTS[0], "--json").stdout)
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
    fed, prompt_length = 0, len(ids)
    while ids[-1] != ids[prompt_length - 1] or not fed:  # <EOS>
        new = {"input_ids": np.array([ids[fed:]]), "position_ids": np.arange(fed, len(ids))[None]}
        mask = {"attention_mask": np.ones((1, len(ids)), np.int64)}
        logits, *present = session.run(None, new | mask | past)
        past, fed = dict(zip(past, present, strict=True)), len(ids)
        ids.append(int(logits[0, -1].argmax()))
        assert len(ids) < prompt_length + 4
    assert Tokenizer.from_file(str(bundle / "tokenizer.json")).decode(ids[prompt_length:]) == "awesome"


def test_an_uninstalled_checkout_works():
    """Without site-packages there is no editable install to lean on."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pastkey.runtime as r; print(r.__file__)"
    assert ran(sys.executable, "-I", "-S", "-c", code).stdout == f"{ROOT / 'runtime' / '__init__.py'}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom pastkey.__main__ import COMMANDS, main\n"
        "for words in ([], *([command] for command in COMMANDS)):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'tokenizers', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = ran(sys.executable, "-c", code)
    assert done.stderr == "[]\n"
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
    expected = {file for stage in STAGES for file in (ROOT / stage).rglob("*.py")}
    for folder in ("see/page", "web/page", "web/lib"):  # the last only after `make web-assets`
        expected |= {*(ROOT / folder).glob("*")}
    own = {file.relative_to(ROOT).as_posix() for file in (ROOT / "pastkey").rglob("*.py")} | {"pastkey/py.typed"}
    assert set(files) == own | {f"pastkey/{file.relative_to(ROOT).as_posix()}" for file in expected}


@pytest.mark.matrix  # CI installs the wheel for `make runtime-oldest` and `make runtime-newest`
def test_the_wheel_with_the_cpu_extra_is_a_working_runtime(wheel, classic, tmp_path):
    """In an environment without torch."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs, elsewhere = tmp_path / "venv" / "bin", tmp_path / "elsewhere"
    ran(programs / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    shutil.copytree(classic / "bundle", elsewhere / "bundle")
    code = (
        "import importlib.util as u, pastkey\n"
        "print([m for m in ('torch', 'onnx', 'transformers') if u.find_spec(m)])\n"
        "lm = pastkey.load('bundle')\n"
        f"print([lm.generate(p).text for p in {PROMPTS!r}])\n"
    )
    assert ran(programs / "python", "-c", code, cwd=elsewhere).stdout == "[]\n['awesome', 'awesome']\n"
    ran(programs / "pastkey", "inspect", "bundle", cwd=elsewhere)
    done = subprocess.run(
        [programs / "pastkey", "export", "x", "--out", "y"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "type  pip install torch onnx onnx-ir onnxscript safetensors " in done.stderr  # tqdm comes with tokenizers
    assert done.stderr.count("\n") == 1
