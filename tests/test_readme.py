"""The README keeps its word: its example is the file in examples/, and exports and runs as it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_in_the_readme_is_the_one_in_examples() -> None:
    block = README.split("<!-- examples/own_module.py -->\n```python\n")[1].split("```\n<!-- end of example -->")[0]
    assert block == (ROOT / "examples" / "own_module.py").read_text(encoding="utf-8")


def test_the_example_exports_and_runs_by_the_commands_of_the_readme(
    pastkey_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    export, run = re.findall(r"^    pastkey (export examples.*|run my_bundle.*)$", README, re.MULTILINE)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = pastkey_command(*export.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = pastkey_command(*run.split(), "--max-new-tokens", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d+", done.stdout)) == 5


def test_the_programs_that_are_shown_are_those_that_the_tests_run() -> None:
    page = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- (tests/programs/\S+) -->\n```\w+\n(.*?)```\n<!-- end -->", page, re.DOTALL)
    folder = ROOT / "tests" / "programs"
    run = {*folder.glob("greedy*"), folder / "page.html"}
    assert {name for name, _ in shown} == {path.relative_to(ROOT).as_posix() for path in run}
    for name, content in shown:
        assert content == (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/design.md", "docs/programs.md", "docs/performance.md", "CONTRIBUTING.md"]
)
def test_files_that_the_pages_name_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    made = {"tokenizer.json", "config.json", "tokenizer_config.json", "model.safetensors", "pastkey.json", "file.py"}
    made |= {"genai_config.json"}
    for name in set(re.findall(r"`([\w/]+\.(?:py|md|json|safetensors))`", text)) - made:
        folders = [ROOT, ROOT / "export", ROOT / "runtime", ROOT / "train"]
        assert any((folder / name).exists() for folder in folders), f"{page} names {name}"
