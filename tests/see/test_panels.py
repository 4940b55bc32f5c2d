"""What the panels show is what was computed."""

from __future__ import annotations

import numpy as np
import pytest

import pastkey
from pastkey.see.inspection import inspect
from pastkey.see.panels import TokenTexts, panels, visible
from pastkey.see.text import EXAMPLE, continued, stages

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
    assert [words[place] for place in found["text"]["ids"]] == [
        str(token) for token in [*text.ids, text.following][-rows - 1 :]
    ]
    weights = found["attention"]["weights"]
    assert weights.shape == (2, 4, rows, rows + (shown < 11))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    p = np.exp(seen.logits - seen.logits.max(-1, keepdims=True))
    chosen = (p / p.sum(-1, keepdims=True))[range(rows), [*text.ids, text.following][-rows:]]
    np.testing.assert_allclose(2.0 ** -found["text"]["surprise"], chosen, rtol=1e-4)
    assert found["next"]["p"][-1, 0] == chosen[-1].astype(np.float32) or np.isclose(
        found["next"]["p"][-1, 0], chosen[-1]
    )
    assert np.abs(found["reference"]["kl"]).max() < 1e-9  # softmax does not see what all logits have in common
    assert found["cache"]["bytes"] == 2 * 2 * (16 + 16) * 4
    assert len(found["sampler"]["at"]) == rows
    assert found["sampler"]["example"]


def test_a_token_without_text_is_named_by_its_number():
    words = TokenTexts(None)
    assert words.places([[7, 9], [9, 7]]).tolist() == [[0, 1], [1, 0]]
    assert words.texts == ["7", "9"]


def test_what_does_not_show_has_a_sign():
    texts = ["a b", " the", "\n", "a\tb", "\x00\u202e", "", "  ", "é🚀"]
    assert list(map(visible, texts)) == ["a b", "␣the", "⏎", "a⇥b", "U+0000U+202E", "", "␣␣", "é🚀"]


@pytest.mark.parametrize(("token", "text"), [(0, "a"), (1, r"\xf0"), (2, "[2]")])
def test_a_part_of_a_character_shows_its_bytes(token, text):
    class Codec:
        def written(self, token: int) -> bytes:
            return [b"a", "🚀".encode()[:1], b""][token]

    words = TokenTexts(Codec())  # type: ignore[arg-type]
    words.place(token)
    assert words.texts == [text]
