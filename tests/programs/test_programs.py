"""One bundle folder, and the other programs that load it as it is: each gives pastkey's greedy tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import pastkey

from ..shared import divided
from .conftest import BUNDLES
from .programs import PROGRAMS

pytestmark = pytest.mark.slow

PROMPTS = (
    "Zoë had 37",
    "Tom had 2 red",
    "“Oh!” (1 234 times).\n\n  Ben had 37",
    "Anna said: “Oh!”<|endoftext|>Lily had 2",
    "",
)
NEW_TOKENS = 24
# Where pastkey's top two logits are closer, other kernels may rightly choose the other token.
CLOSE = 0.1


CASES = [(name, program) for name in BUNDLES for program in PROGRAMS]
CI_CASES = [("llama", "genai"), ("llama", "node")]


@pytest.mark.parametrize(("name", "program"), divided(CASES, ci=CI_CASES))
def test_the_same_folder_gives_the_same_greedy_tokens(bundles, name, program):
    bundle = bundles(name)
    lm = pastkey.load(bundle)
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
