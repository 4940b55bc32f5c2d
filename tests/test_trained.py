"""A decoder that others trained, whose answer is known without us: stories260K, a llama2.c checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.export.measure.metrics import kl_divergence
from pastkey.runtime import load

from .shared import shared

pytestmark = pytest.mark.matrix  # a public clone has no ../shared


# What `./run stories260K.bin -z tok512.bin -t 0.0` prints, by doc/stories260K.md of llama2.c: 256 tokens.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." Her mom said, "Don't worry, \
Lily. We can help you."""


@pytest.fixture(scope="module")
def stories(pastkey_command, tmp_path_factory):
    """A folder with the bundles fp32/ and int8/, made by the command."""
    folder, out = shared("models/stories260K"), tmp_path_factory.mktemp("stories")
    for precision in ("fp32", "int8"):
        given = (folder / "stories260K.bin", "--tokenizer", folder / "tok512.bin", "--precision", precision)
        done = pastkey_command("export", *given, "--out", out / precision)
        assert done.returncode == 0, done.stderr
    return out


def test_stories260k_tells_its_documented_story_up_to_the_token_that_begins_the_next(stories):
    told = load(stories / "fp32").generate("", max_new_tokens=500)
    assert load(stories / "fp32").generate("", max_new_tokens=256).text == STORY
    assert told.finish_reason == "stop"
    assert told.text.startswith(STORY)


def test_int8_of_stories260k_leaves_the_story_only_where_two_tokens_are_as_likely(stories):
    exact, quantized = load(stories / "fp32"), load(stories / "int8")
    told, found = (model.generate("", max_new_tokens=256).ids for model in (exact, quantized))
    logits = exact.logits([1, *told])
    assert found[:32] == told[:32]
    # Three times the root mean square of int8's error here. How the rounding falls depends on the last bits of what
    # calibration sees, and so on the number of threads.
    step = next((i for i, (a, b) in enumerate(zip(told, found, strict=True)) if a != b), None)
    assert step is None or -np.diff(np.sort(logits[step])[-2:][::-1]) < 0.25
    assert kl_divergence(logits, quantized.logits([1, *told])) < 1e-3
