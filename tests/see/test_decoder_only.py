"""docs/decoder-only.md: its commands run, and every number is computed again.

Training differs in the last digits between processors, so that numbers may be off by a little.
"""

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.__main__ import main
from benchmarks.measure import rows_of
from benchmarks.pictures import inside
from pastkey.contract.bundle import open_bundle
from pastkey.see import cli
from pastkey.train.data.prepare import LESSON

from ..programs.environments import install_chromium

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "decoder-only.md").read_text(encoding="utf-8")
PERCENT, CHANNEL = 4, 0.06


@pytest.fixture(scope="module")
def numbers(classic):
    arguments = cli.argparse.ArgumentParser()
    cli.see_command.add_arguments(arguments)
    asked = arguments.parse_args(["bundle", "--prompt", "what is statquest", "--out", "page.html"])
    found = cli.look(open_bundle(classic / "bundle"), asked)
    return found | {"words": [found["vocabulary"][place] for place in found["text"]["ids"]]}


def rows(first):
    return [{key: cell.strip("`") for key, cell in row.items()} for row in rows_of(PAGE, first)]


def test_sentences_tokens_and_embeddings_are_those_of_the_page(numbers):
    assert all(f"`{sentence}`" in PAGE for sentence in LESSON)
    assert numbers["words"] == LESSON[0].split()
    assert numbers["model"]["tokens"] == len(set(LESSON[0].split())) == 5
    parts, shown = numbers["embedding"]["parts"], rows("token")
    assert parts["word"].shape[1] == 16
    assert [row["token"] for row in shown] == numbers["words"][:3]
    for place, row in enumerate(shown):
        for name, heading in (("word", "word embedding"), ("position", "position encoding"), ("sum", "sum")):
            expected = [float(number) for number in row[heading].split()]
            assert np.abs(parts[name][place, :3] - expected).max() < (0.006 if name == "position" else CHANNEL)


def test_weights_of_attention_and_guesses_are_those_of_the_page(numbers):
    weights, read, shown = numbers["attention"]["weights"][0, 0], numbers["words"][:5], rows("reads")
    assert [row["reads"] for row in shown] == read
    for place, row in enumerate(shown):
        cells = [row[f"`{word}`" if word == "<EOS>" else word] for word in read]
        assert cells[place + 1 :] == [""] * (4 - place)
        expected = [float(cell) for cell in cells[: place + 1]]
        assert np.abs(100 * weights[place, : place + 1] - expected).max() < PERCENT
    shown = rows("after")
    assert [(row["after"], row["came next"]) for row in shown] == list(itertools.pairwise(numbers["words"]))
    for name, layer in zip(("before layer 1", "after layer 1"), numbers["layers"]["at"], strict=True):
        assert np.abs(100 * layer["next"] - [float(row[name]) for row in shown]).max() < PERCENT


def test_steps_are_those_of_the_page(numbers):
    prompt, every, shown = numbers["text"]["prompt"], numbers["words"], rows("step")
    steps = [(prompt, 0), *((1, place) for place in range(prompt, len(every) - 1))]
    assert [(int(row["new keys and values"]), int(row["from the cache"])) for row in shown] == steps
    assert [row["predicts"] for row in shown] == every[prompt:]
    assert numbers["text"]["ended"]
    assert f"{numbers['cache']['bytes']} bytes for each token" in PAGE
    assert numbers["next"]["p"][1, 0] > 0.99  # the picture of the next token says so
    assert numbers["vocabulary"][numbers["next"]["ids"][1, 0]] == "statquest"


def test_the_commands_run_and_a_panel_becomes_a_picture(classic, command, tmp_path, monkeypatch):
    (tmp_path / "classic").symlink_to(classic / "checkpoint")
    (tmp_path / "classic-bundle").symlink_to(classic / "bundle")
    monkeypatch.chdir(tmp_path)
    lines = [shlex.split(line) for line in re.findall(r"^    pastkey (see .*)$", PAGE, re.MULTILINE)]
    assert [line[-1] for line in lines] == ["page.html", "compared.html"]
    for line in lines:
        status, _, err = command(*line)
        assert status == 0, err
    assert re.findall(r"\]\(decoder-(\w+)\.png\)", PAGE) == [*inside.PANELS]
    if install_chromium() is None:
        pytest.skip("chromium is not installed")
    monkeypatch.setattr(inside, "PANELS", {"next": inside.PANELS["next"]})
    assert main(["decoder-pictures", "page.html", str(tmp_path)]) == 0
    drawn, shown = imread(tmp_path / "decoder-next.png"), imread(DOCS / "decoder-next.png")
    assert np.ptp(drawn[..., :3]) > 0.5
    assert abs(drawn.shape[0] / shown.shape[0] - 1) < 0.2  # fonts differ
