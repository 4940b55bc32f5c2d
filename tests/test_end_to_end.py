"""text -> checkpoint/ -> bundle/ -> text, by the commands; and the content of the wheel."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest

import pastkey
from pastkey.__main__ import COMMANDS
from tools.wheel import build_wheel, without_links

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


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert all(name.startswith("pastkey/") for name in files), files
    expected = {file for stage in STAGES for file in (ROOT / stage).rglob("*.py")}
    for folder in ("see/page", "serve/page", "web/page", "web/lib"):  # the last only after `make web-assets`
        expected |= {*(ROOT / folder).glob("*")}
    own = {file.relative_to(ROOT).as_posix() for file in (ROOT / "pastkey").rglob("*.py")} | {"pastkey/py.typed"}
    assert set(files) == own | {f"pastkey/{file.relative_to(ROOT).as_posix()}" for file in expected}


def test_the_packages_readme_links_to_no_file_of_the_checkout():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/" in readme
    assert "](docs/" not in without_links(readme)
    assert without_links("A [page](https://x.org/y) and [one](docs/z.md#w).") == "A [page](https://x.org/y) and one."
