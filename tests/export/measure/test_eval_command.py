"""`pastkey eval` as a user types it: exit status, figures, one sentence per mistake."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pastkey.__main__ import main
from pastkey.train.checkpoint import load_checkpoint

from ..commands import fails
from ..conftest import saved_untrained

KEYS = [
    "perplexity", "kl_divergence", "top1_agreement", "greedy_agreement", "reference_perplexity",
    "tokens", "windows", "length", "bundle", "reference",
]  # fmt: skip
COUNT = 150  # words of the text
MINE = """
import torch
from torch import nn
from pastkey.train.checkpoint import load_checkpoint

def make():
    print("loading")
    return load_checkpoint({path!r}).model

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make()
    def forward(self, input_ids, position_ids):
        if input_ids.shape[1] > 9:
            raise ValueError("too many at once")
        return self.model(input_ids, position_ids)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint, word_tokenizer):
    """The checkpoint's bundles int8 and fp32, one without a tokenizer, texts, and sources that are no reference."""
    path = tmp_path_factory.mktemp("evaluated")
    (path / "mine.py").write_text(MINE.format(path=str(checkpoint)))
    for out, source, *more in (
        ("int8", str(checkpoint)),
        ("fp32", str(checkpoint), "--precision", "fp32"),
        ("ids_only", f"{path}/mine.py:make", "--context", "40", "--precision", "fp32"),
    ):
        assert main(["export", source, *more, "--out", str(path / out)]) == 0
    saved_untrained(path / "shorter", word_tokenizer, max_position_embeddings=20)
    saved_untrained(path / "larger", word_tokenizer, vocab_size=62)
    content = json.loads(word_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    saved_untrained(path / "swapped", Tokenizer.from_str(json.dumps(content)))
    words = np.random.default_rng(1).integers(0, 60, COUNT)
    (path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (path / "one.txt").write_text("w1")
    (path / "short.txt").write_text("\ufeffw1 w2 w3")
    (path / "nothing").mkdir()
    return path


def test_json_has_the_same_figures_by_a_bundle_a_checkpoint_and_a_factory(folder, checkpoint, command):
    found = []
    for reference in (checkpoint, folder / "fp32", f"{folder}/mine.py:make", folder / "ids_only"):
        choices = ("--text", folder / "text.txt", "--reference", reference, "--threads", 1, "--json")
        status, out, _ = command("eval", folder / "int8", *choices)
        assert (status, out.count("\n")) == (0, 1)
        found.append(json.loads(out))
        for key in KEYS[:5]:
            assert found[-1][key] == pytest.approx(found[0][key], rel=1e-3), key
    figures = found[0]
    assert list(figures) == KEYS
    assert [figures[key] for key in KEYS[5:]] == [COUNT, 4, 40, str(folder / "int8"), str(checkpoint)]
    assert 1e-6 < figures["kl_divergence"] < 0.05
    assert 0.5 < figures["top1_agreement"] <= 1
    assert 0 < figures["greedy_agreement"] <= 1
    assert figures["perplexity"] == pytest.approx(figures["reference_perplexity"], rel=0.05)
    assert figures["perplexity"] != figures["reference_perplexity"]


def test_perplexity_is_torchs_on_the_words_of_the_text(folder, checkpoint, command):
    choices = ("--text", folder / "text.txt", "--length", 32, "--windows", 2, "--json")
    status, out, _ = command("eval", folder / "fp32", *choices)
    figures = json.loads(out)
    ids = torch.tensor([int(word[1:]) for word in (folder / "text.txt").read_text().split()[:64]]).view(2, 32)
    with torch.no_grad():
        logits = load_checkpoint(checkpoint).model(ids, torch.arange(32).expand(2, 32))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert figures["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert (status, [figures[key] for key in KEYS[5:8]]) == (0, [64, 2, 32])
    assert [figures[key] for key in (*KEYS[1:5], "reference")] == [None] * 5


def test_a_person_is_shown_the_figures_line_by_line(folder, checkpoint, command):
    status, out, err = command("eval", folder / "fp32", "--text", folder / "text.txt", "--reference", checkpoint)
    lines = [line.split() for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [line[0] for line in lines[:5]] == [KEYS[0], KEYS[4], *KEYS[1:4]]
    assert lines[3:5] == [["top1_agreement", "100.0%"], ["greedy_agreement", "100.0%"]]
    assert f"{COUNT} tokens in windows of at most 40, 4 of them" in out
    status, out, _ = command("eval", folder / "fp32", "--text", folder / "text.txt")
    assert [line.split()[0] for line in out.splitlines()] == ["perplexity", f"{folder / 'fp32'}:"]


def test_a_short_text_asks_no_longer_context_of_the_reference(folder, command):
    choices = ("--text", folder / "short.txt", "--reference", folder / "shorter", "--json")
    status, out, _ = command("eval", folder / "fp32", *choices)
    assert (status, json.loads(out)["length"]) == (0, 3)


MISTAKES = {
    "fp32 --text none.txt": ("no such file: ", "none.txt"),
    "fp32 --text one.txt": ("one.txt is too short, 1 token", "at least 2"),
    "none --text text.txt": ("no such bundle",),
    "ids_only --text text.txt": ("ids_only has no tokenizer", "--tokenizer"),
    "fp32 --text text.txt --length 41": ("--length is 41", "2 to 40 tokens"),
    "fp32 --text text.txt --reference none": ("no such source", "expected a checkpoint"),
    "fp32 --text text.txt --reference nothing": ("nothing has no config.json",),
    "fp32 --text text.txt --reference mine.py:Fails": ("too many at once", "on 40 tokens"),
    "fp32 --text text.txt --reference larger": ("larger has a vocabulary of 62", "one of 61"),
    "fp32 --text text.txt --reference swapped": ("token 1 is 'w2' in the reference", "'w1' in"),
    "fp32 --text text.txt --reference shorter": ("--length 20 or less",),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_sentence(typed, folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    fails(command("eval", *typed.split(), "--json"), *MISTAKES[typed])


HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "tqdm", "matplotlib")


@pytest.mark.parametrize("typed", ["eval int8 --text text.txt --reference fp32 --json", "verify int8 --json"])
def test_a_bundle_alone_needs_the_runtimes_packages_only(typed, folder):
    code = (
        "import sys\n"
        "from pastkey.__main__ import main\n"
        f"status = main({typed.split()})\n"
        f"print(status, [name for name in {HEAVY} if sys.modules.get(name)], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"
    assert json.loads(done.stdout)
