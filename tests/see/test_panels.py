"""The panels show the computed numbers; the text is the runtime's, and so is every stage of the sampler."""

import base64
import hashlib
import re

import numpy as np
import pytest

import pastkey
from pastkey.errors import InputError
from pastkey.runtime.sampling.sampler import Sampler
from pastkey.runtime.settings import SamplingConfig
from pastkey.see.inline import page
from pastkey.see.inspection import inspect
from pastkey.see.panels import TokenTexts, panels, visible
from pastkey.see.text import EXAMPLE, Text, continued, stages

from .conftest import data_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("shown", [99, 5])
def test_every_panel_has_the_shown_tokens(bundle_of, shown):
    bundle = bundle_of("llama")
    with pastkey.load(bundle.path, "cpu") as lm:
        text = continued(lm, PROMPT, 4, {})
    seen = inspect(bundle, text.ids, text.following, shown=shown)
    rows = min(shown, 11)  # the last of 12 tokens is predicted, and not read
    steps = list(stages(text, seen.first, seen.logits, EXAMPLE, 3))
    found = panels(bundle, None, text, seen, EXAMPLE, steps, ("other", seen.logits + 1))
    words = found["vocabulary"]
    every = [*text.ids, text.following]
    assert [words[place] for place in found["text"]["ids"]] == [str(token) for token in every[-rows - 1 :]]
    weights = found["attention"]["weights"]
    assert weights.shape == (2, 4, rows, rows + (shown < 11))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    p = np.exp(seen.logits - seen.logits.max(-1, keepdims=True))
    chosen = (p / p.sum(-1, keepdims=True))[range(rows), every[-rows:]]
    np.testing.assert_allclose(2.0 ** -found["text"]["surprise"], chosen, rtol=1e-4)
    assert np.isclose(found["next"]["p"][-1, 0], chosen[-1])
    assert np.abs(found["reference"]["kl"]).max() < 1e-9  # softmax does not see what all logits have in common
    assert found["cache"]["bytes"] == 2 * 2 * (16 + 16) * 4
    assert len(found["sampler"]["at"]) == rows
    assert found["sampler"]["example"]


def test_what_does_not_show_has_a_sign():
    texts = ["a b", " the", "\n", "a\tb", "\x00\u202e", "", "  ", "é🚀"]
    assert list(map(visible, texts)) == ["a b", "␣the", "⏎", "a⇥b", "U+0000U+202E", "", "␣␣", "é🚀"]


class Codec:
    """Of a letter, a part of a character, and nothing."""

    def written(self, token):
        return [b"a", "🚀".encode()[:1], b""][token]


def test_a_part_of_a_character_shows_its_bytes_and_a_token_without_text_its_number():
    for codec, tokens, texts in ((Codec(), [0, 1, 2], ["a", r"\xf0", "[2]"]), (None, [7, 9, 3], ["7", "9", "3"])):
        words = TokenTexts(codec)  # type: ignore[arg-type]
        assert words.places([tokens, tokens]).tolist() == [[0, 1, 2]] * 2
        assert words.texts == texts


# --- the text -----------------------------------------------------------------------------------------------------
def test_a_text_ends_with_its_end_token_or_with_the_last_that_was_asked_for(classic, monkeypatch):
    """One of more tokens than fit is refused before it is computed."""
    prompt = "what is statquest"
    with pastkey.load(classic / "bundle", "cpu") as lm:
        (end,), ids, done = lm.manifest.eos_token_ids, lm.prompt_ids(prompt), lm.generate(prompt, max_new_tokens=9)
        assert continued(lm, prompt, 9, {}) == Text([*ids, *done.ids], 4, end, True)
        assert continued(lm, prompt, 1, {}) == Text(ids, 4, done.ids[0], False)
        monkeypatch.setattr("pastkey.see.text.MOST_TOKENS", 5)
        monkeypatch.setattr(type(lm), "generate", None)
        with pytest.raises(InputError, match="the prompt has 4 tokens and 9 may follow; see looks inside 5 at most"):
            continued(lm, prompt, 9, {})


def test_stages_are_those_of_the_sampler_and_contain_its_draw():
    logits = np.random.default_rng(0).normal(0, 3, (3, 50)).astype(np.float32)
    text = Text([4, 8, 15], 2, 16, False)
    found = list(stages(text, 0, logits, {**EXAMPLE, "repetition_penalty": 1.3}, 5))
    assert [step.names for step in found] == [["all tokens", "penalties", "temperature", "top_k", "top_p", "min_p"]] * 3
    for place, step in enumerate(found):
        assert step.kept == sorted(step.kept, reverse=True)
        assert step.kept[3] == 40
        assert step.ids.tolist() == np.argsort(-logits[place])[:5].tolist()
        sampler = Sampler(SamplingConfig.of({**EXAMPLE, "repetition_penalty": 1.3}), prompt_tokens=2)
        drawn = sampler(logits[place], text.ids[: place + 1])
        *_, (_, last) = sampler.stages(logits[place], text.ids[: place + 1])
        assert last[drawn] > -np.inf
        assert np.isclose(np.exp(last - last.max()).sum() * step.probabilities[-1].max(), 1)


# --- one file that loads nothing ------------------------------------------------------------------------------------
def example(word="a"):
    weights = np.tril(np.random.default_rng(0).random((2, 3, 4, 4), np.float32))
    return {"model": {"source": f"<{word}>"}, "attention": {"weights": weights}, "vocabulary": [word]}


def test_the_policy_allows_its_own_script_and_style_alone():
    content = page(example())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', content)
    (style,) = re.findall(r"<style>(.*?)</style>", content, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", content, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    own = [f"{kind} 'sha256-{sha256}'" for kind, sha256 in zip(("style-src", "script-src"), hashes, strict=True)]
    assert policy.split("; ")[:3] == ["default-src 'none'", *own]
    assert not re.findall(r"""(?:src|href)=["'](?!#)|\bon\w+=|style=["']|@import|url\(""", content)


def test_no_token_ends_the_data_or_stands_for_a_part_of_the_page():
    word = "</script><script>alert(1)</script>{{script}}{{data}}<!--"
    content = page(example(word))
    assert data_of(content)["vocabulary"] == [word]
    assert content.count("<script>") == 1
    assert "<h1>Inside &lt;&lt;/script" in content
    assert "<title>My &lt;page&gt;</title>" in page(example(word), "My <page>")


@pytest.mark.parametrize(("least", "low"), [(0, 0), (-0.25, -0.5)])
def test_weights_are_bytes_of_their_roots_without_what_is_masked(least, low):
    panels = example()
    panels["attention"]["weights"][0, 0, 3, 0] = least
    packed = data_of(page(panels))["attention"]["weights"]
    assert (packed["low"], packed["high"], packed["columns"], packed["codes"]["shape"]) == (low, 1, 4, [2, 3, 10])
    codes = np.frombuffer(base64.b64decode(packed["codes"]["data"]), np.uint8).reshape(2, 3, 10)
    weights = panels["attention"]["weights"][:, :, *np.tril_indices(4)]
    expected = np.sign(weights) * np.sqrt(np.abs(weights))
    assert np.abs(low + (1 - low) * codes / 255 - expected).max() <= (1 - low) * 0.5 / 255 + 1e-6
