"""One bundle folder, and the other programs that load it as it is: each gives pastkey's greedy tokens.

These are the cells of the table in docs/bundle-format.md.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import pastkey
from benchmarks.environments import ROOT
from pastkey.contract.bundle import open_bundle

from ..shared import divided
from .conftest import BUNDLES
from .programs import PROGRAMS

pytestmark = pytest.mark.slow

PROMPTS = ("Zoë had 37", "Tom had 2 red", "“Oh!” (1 234 times).\n\n  Ben had 37", "“Oh!”<|endoftext|>Lily had 2", "")
NEW_TOKENS = 24
# Where pastkey's top two logits are closer, other kernels may rightly choose the other token.
CLOSE = 0.1


# The table of docs/bundle-format.md: (precision, graph, target) -> the bundle that its row is tested with.
ROWS = {
    ("int8", "fused", "cpu"): "llama",
    ("int4", "fused", "cpu"): "llama-int4",
    ("fp16", "fused", "cpu"): "llama-fp16",
    ("fp32", "fused", "cpu"): "llama-fp32",
    ("int8", "standard", "cpu"): "llama-standard",
    ("int8", "standard", "portable"): "llama-portable",
    ("fp32", "static", "cpu"): "llama-static",
    ("int8", "static", "qnn"): "llama-qnn-int8",
    ("fp32", "fused", "webgpu"): "llama-webgpu",
    ("int8", "fused", "webgpu"): "llama-webgpu-int8",
}
REFUSED = {("llama-webgpu-int8", "browser"): "GatherBlockQuantized"}

NAMES = [*dict.fromkeys([*BUNDLES, *ROWS.values()])]
CASES = [case for name in NAMES for program in PROGRAMS if (case := (name, program)) not in REFUSED]
CI_CASES = [("llama", "onnxruntime"), ("llama", "genai"), ("llama", "node")]


def test_the_page_says_what_is_tested():
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    table = page.split("| precision | graph | target |")[1].split("\n\n")[0].splitlines()[2:]
    rows = {tuple(cells[:3]): cells[3:] for line in table if (cells := re.findall(r"[^|\s]+", line))}
    assert list(rows) == list(ROWS)
    for row, cells in rows.items():
        assert cells == ["no" if (ROWS[row], program) in REFUSED else "yes" for program in PROGRAMS]


@pytest.mark.matrix
@pytest.mark.parametrize("row", ROWS)
def test_the_bundle_of_a_row_is_of_this_kind(bundles, row):
    manifest = open_bundle(bundles(ROWS[row])).manifest
    assert (manifest.precision, manifest.graph, manifest.target) == row


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "program"), REFUSED)
def test_a_program_without_an_operator_refuses_the_bundle(bundles, name, program):
    with pytest.raises(AssertionError, match=REFUSED[name, program]):
        PROGRAMS[program](bundles(name), PROMPTS[:1], 1)


@pytest.mark.parametrize(("name", "program"), divided(CASES, ci=CI_CASES))
def test_the_same_folder_gives_the_same_greedy_tokens(bundles, name, program):
    bundle = bundles(name)
    lm = pastkey.load(bundle, "cpu")
    # An empty prompt is one where the tokenizer adds a BOS token.
    prompts = [prompt for prompt in PROMPTS if prompt or tokenizer_adds_tokens(bundle)]
    answers = PROGRAMS[program](bundle, prompts, NEW_TOKENS)
    assert len(answers) == len(prompts)
    compared = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.prompt_ids == lm.prompt_ids(prompt)
        expected, clear = greedy(lm, answer.prompt_ids)
        ids = [token for token in answer.ids if token not in lm.manifest.eos_token_ids]
        assert ids[:clear] == expected[:clear]
        if clear > len(expected):
            assert ids == expected  # it ended where pastkey did
        compared += clear
    assert compared >= NEW_TOKENS  # or it was too close everywhere to say anything


def tokenizer_adds_tokens(bundle: Path) -> bool:
    return bool(Tokenizer.from_file(str(bundle / "tokenizer.json")).encode("").ids)


def greedy(lm: pastkey.LanguageModel, prompt_ids: list[int]) -> tuple[list[int], int]:
    """pastkey's new tokens, and how many choices come before the first close one: one more than tokens with the end."""
    completion = lm.generate(prompt_ids, max_new_tokens=NEW_TOKENS)
    logits = lm.logits([*prompt_ids, *completion.ids])[len(prompt_ids) - 1 :]  # (new tokens + 1, V)
    choices = len(completion.ids) + (completion.finish_reason == "stop")
    first, second = np.sort(logits[:choices], axis=-1)[:, :-3:-1].T
    close = np.flatnonzero(first - second < CLOSE)
    return completion.ids, int(close[0]) if close.size else choices
