"""The command: one file, or one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from .test_inline import data_of


@pytest.mark.slow
def test_a_bundle_becomes_a_page(classic, command, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = command("see", classic / "bundle", "--prompt", "what is statquest", "--out", page)
    assert (status, out) == (0, "")
    assert err == f"{page}: {page.stat().st_size / 1000:.0f} kB\n"
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["text"]["ended"]
    assert set(data["vocabulary"]) >= {"what", "is", "statquest", "awesome"}
    assert page.stat().st_size < 60_000


@pytest.mark.slow
def test_a_checkpoint_is_exported_for_the_page_and_compared_with_its_bundle(classic, command, tmp_path):
    page, asked = tmp_path / "page.html", ["--prompt", "what is statquest", "--reference", classic / "bundle"]
    status, _, err = command("see", classic / "checkpoint", *asked, "--out", page)
    assert status == 0, err
    data = data_of(page.read_text(encoding="utf-8"))
    assert data["model"]["precision"] == "fp32"
    assert data["reference"]["name"] == "bundle"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_source_is_exported_for_the_page_with_its_context_and_tokenizer(classic, command, tmp_path, monkeypatch):
    page, asked = tmp_path / "page.html", list[Any]()

    def exported(source: str, out: Path, **given: Any) -> None:
        asked.append((source, given))
        shutil.copytree(classic / "bundle", out)

    monkeypatch.setattr("pastkey.export.export", exported)
    source, given = "lesson.py:trained", ("--context", "16", "--tokenizer", "lesson.py:tokenizer")
    status, _, err = command("see", source, "--prompt", "what is", "--out", page, *given)
    assert status == 0, err
    assert asked == [(source, {"precision": "fp32", "context_length": 16, "tokenizer": "lesson.py:tokenizer"})]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--layers", "2"], "there is no layer 2: this decoder has 1, from 1 on"),
        (["--layers", "0"], "argument --layers: '0' is not a list of numbers from 1, such as 1,2,3"),
        (["--heads", "x"], "argument --heads: 'x' is not a list of token ids such as 1,2,3"),
        (["--position", "9"], "--position 9 is none of the tokens that are shown, 1 to 5"),
        (["--last", "257"], "--last is 257, and a page shows 256 tokens at most"),
        (["--context", "9"], "BUNDLE is a bundle, which has its context and its tokenizer: leave out --context"),
        (["--top-p", "0"], "argument --top-p: '0' was given; it must be above 0 and at most 1"),
        (["--reference", "nowhere"], "no such source: nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_file(classic, command, tmp_path, flags, sentence):
    page = tmp_path / "page.html"
    status, _, err = command("see", classic / "bundle", "--prompt", "what is statquest", "--out", page, *flags)
    assert status == 2
    assert err.replace(str(classic / "bundle"), "BUNDLE").startswith(f"pastkey see: {sentence}")
    assert err.count("\n") == 1
    assert not page.exists()


def test_a_bundle_without_a_tokenizer_takes_ids(bundle_of, command, tmp_path):
    page, bundle = tmp_path / "page.html", bundle_of("llama").path
    status, _, err = command("see", bundle, "--prompt", "a", "--out", page)
    assert (status, "no tokenizer" in err) == (2, True)
    assert command("see", bundle, "--prompt-ids", "3,1,4", "--out", page)[0] == 0
    assert data_of(page.read_text(encoding="utf-8"))["vocabulary"][:3] == ["3", "1", "4"]
    assert command("see", bundle, "--prompt-ids", "3", "--out", tmp_path)[2].endswith("--out names the file to write\n")


def test_a_long_text_says_what_is_left_out(bundle_of, command, tmp_path):
    page = tmp_path / "page.html"
    asked = ["--prompt-ids", "3,1,4,1,5,9,2,6", "--last", "4", "--heads", "2", "--max-new-tokens", "3"]
    assert command("see", bundle_of("llama").path, *asked, "--out", page)[0] == 0
    data = data_of(page.read_text(encoding="utf-8"))
    assert (data["text"]["first"], data["attention"]["heads"], data["attention"]["calls"]) == (6, [1], [0, 1])
    assert data["attention"]["weights"]["columns"] == 5
