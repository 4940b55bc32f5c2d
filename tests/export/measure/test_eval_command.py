"""`pastkey eval` as a user types it: exit status, figures, one sentence per mistake."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.files.durable import write_json
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL, TrainingState, load_checkpoint, save_checkpoint

from ..commands import fails
from ..decoders import llama

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

Result = tuple[int, str, str]
Evaluate = Callable[..., Result]


@pytest.fixture
def evaluated(capsys):
    """evaluated(ARGUMENT, ...): exit status, standard output and standard error of `pastkey eval`."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            status = main(["eval", *map(str, arguments)])
        except SystemExit as end:  # argparse ends this way
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def saved(folder: Path, tokenizer: Tokenizer, **sizes: int) -> Path:
    """A checkpoint of an untrained decoder."""
    (folder / "training").mkdir(parents=True)
    tokenizer.save(str(folder / names.TOKENIZER))
    write_json(folder / names.TOKENIZER_CONFIG, {"eos_token": "<end>", "bos_token": None})
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(b"\0\0")
    save_checkpoint(folder, llama(eos_token_id=60, **sizes), TrainingState(0, {}, {}, {}, {}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint, word_tokenizer):
    """The checkpoint's bundles int8 and fp32, one without a tokenizer, texts, and what is no reference of them."""
    path = tmp_path_factory.mktemp("evaluated")
    (path / "mine.py").write_text(MINE.format(path=str(checkpoint)))
    assert main(["export", str(checkpoint), "--out", str(path / "int8")]) == 0
    assert main(["export", str(checkpoint), "--precision", "fp32", "--out", str(path / "fp32")]) == 0
    ids_only = ["--context", "40", "--precision", "fp32", "--out", str(path / "ids_only")]
    assert main(["export", f"{path}/mine.py:make", *ids_only]) == 0
    saved(path / "shorter", word_tokenizer, max_position_embeddings=20)
    saved(path / "larger", word_tokenizer, vocab_size=62)
    content = json.loads(word_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    saved(path / "swapped", Tokenizer.from_str(json.dumps(content)))
    words = np.random.default_rng(1).integers(0, 60, COUNT)
    (path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (path / "one.txt").write_text("w1")
    (path / "nothing").mkdir()
    return path


@pytest.mark.slow
def test_json_has_all_figures_and_nothing_else_is_printed(folder, checkpoint, evaluated):
    choices = ("--text", folder / "text.txt", "--reference", checkpoint, "--json")
    status, out, err = evaluated(folder / "int8", *choices)
    assert (status, err, out.count("\n")) == (0, "", 1)
    figures = json.loads(out)
    assert list(figures) == KEYS
    assert (figures["tokens"], figures["windows"], figures["length"]) == (COUNT, 4, 40)
    assert (figures["bundle"], figures["reference"]) == (str(folder / "int8"), str(checkpoint))
    assert 1e-6 < figures["kl_divergence"] < 0.05
    assert 0.5 < figures["top1_agreement"] <= 1
    assert 0 < figures["greedy_agreement"] <= 1
    assert figures["perplexity"] == pytest.approx(figures["reference_perplexity"], rel=0.05)
    assert figures["perplexity"] != figures["reference_perplexity"]


def test_perplexity_is_torchs_on_the_words_of_the_text(folder, checkpoint, evaluated):
    status, out, _ = evaluated(folder / "fp32", "--text", folder / "text.txt", "--length", 32, "--windows", 2, "--json")
    figures = json.loads(out)
    ids = torch.tensor([int(word[1:]) for word in (folder / "text.txt").read_text().split()[:64]]).view(2, 32)
    with torch.no_grad():
        logits = load_checkpoint(checkpoint).model(ids, torch.arange(32).expand(2, 32))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert figures["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert (status, figures["tokens"], figures["windows"], figures["length"]) == (0, 64, 2, 32)
    without = ("kl_divergence", "top1_agreement", "greedy_agreement", "reference_perplexity", "reference")
    assert [figures[key] for key in without] == [None] * 5


def test_a_bundle_a_checkpoint_and_a_factory_are_the_same_reference(folder, checkpoint, evaluated):
    found = []
    for reference in (folder / "fp32", checkpoint, f"{folder}/mine.py:make", folder / "ids_only"):
        choices = ("--text", folder / "text.txt", "--reference", reference, "--threads", 1, "--json")
        status, out, _ = evaluated(folder / "int8", *choices)
        assert status == 0
        found.append(json.loads(out))
    for figures in found[1:]:
        for key in KEYS[:5]:
            assert figures[key] == pytest.approx(found[0][key], rel=1e-3), key


def test_a_person_is_shown_the_figures_line_by_line(folder, checkpoint, evaluated):
    status, out, err = evaluated(folder / "fp32", "--text", folder / "text.txt", "--reference", checkpoint)
    lines = [line.split() for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [line[0] for line in lines[:5]] == [KEYS[0], KEYS[4], *KEYS[1:4]]
    assert lines[3:5] == [["top1_agreement", "100.0%"], ["greedy_agreement", "100.0%"]]
    assert f"{COUNT} tokens in windows of at most 40, 4 of them" in out
    status, out, _ = evaluated(folder / "fp32", "--text", folder / "text.txt")
    assert [line.split()[0] for line in out.splitlines()] == ["perplexity", f"{folder / 'fp32'}:"]


def test_a_short_text_asks_no_longer_context_of_the_reference(folder, evaluated, tmp_path):
    (tmp_path / "short.txt").write_text("\ufeffw1 w2 w3")
    choices = ("--text", tmp_path / "short.txt", "--reference", folder / "shorter", "--json")
    status, out, _ = evaluated(folder / "fp32", *choices)
    assert (status, json.loads(out)["length"]) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fp32", "--text", "none.txt"), ("no such file: ", "none.txt")),
        (("fp32", "--text", "one.txt"), ("one.txt is too short, 1 token", "at least 2")),
        (("none", "--text", "text.txt"), ("no such bundle",)),
        (("ids_only", "--text", "text.txt"), ("ids_only has no tokenizer", "--tokenizer")),
        (("fp32", "--text", "text.txt", "--length", "41"), ("--length is 41", "2 to 40 tokens")),
        (("fp32", "--text", "text.txt", "--reference", "none"), ("no such source", "expected a checkpoint")),
        (("fp32", "--text", "text.txt", "--reference", "nothing"), ("nothing has no config.json",)),
        (("fp32", "--text", "text.txt", "--reference", "mine.py:Fails"), ("too many at once", "on 40 tokens")),
        (("fp32", "--text", "text.txt", "--reference", "larger"), ("larger has a vocabulary of 62", "one of 61")),
        (("fp32", "--text", "text.txt", "--reference", "swapped"), ("token 1 is 'w2' in the reference", "'w1' in")),
        (("fp32", "--text", "text.txt", "--reference", "shorter"), ("--length 20 or less",)),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(arguments, words, folder, evaluated):
    options = ("--length", "--windows")
    known = [
        argument if argument.startswith("--") or arguments[i] in options else str(folder / argument)
        for i, argument in enumerate(arguments[1:])
    ]
    fails(evaluated(folder / arguments[0], *known, "--json"), *words)


HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "tqdm", "matplotlib")


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_a_bundle_alone_needs_the_runtimes_packages_only(command, folder):
    arguments = {
        "eval": ["eval", f"{folder}/int8", "--text", f"{folder}/text.txt", "--reference", f"{folder}/fp32", "--json"],
        "verify": ["verify", f"{folder}/int8", "--json"],
    }[command]
    code = (
        "import sys\n"
        f"heavy = {HEAVY}\n"
        "from pastkey.__main__ import main\n"
        f"status = main({arguments})\n"
        "print(status, [name for name in heavy if sys.modules.get(name)], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 []"
    assert json.loads(done.stdout)
