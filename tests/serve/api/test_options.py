"""The options of a request, and where those that it leaves out come from."""

from __future__ import annotations

from typing import Any

import pytest

from ...runtime.conftest import Tiny, write_bundle
from ..conftest import TEMPLATE, letters, running

GREEDY: dict[str, Any] = {"temperature": 0.0}
DRAWING: dict[str, Any] = {"do_sample": True, "top_k": 3}


@pytest.mark.parametrize(
    ("authors", "flags", "cases"),
    [
        (None, {"temperature": 0.5}, [({}, {"temperature": 0.5})]),
        ({}, {}, [({}, GREEDY)]),
        (
            {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.9},
            {},
            [
                ({}, {**GREEDY, "repetition_penalty": 1.9}),
                ({"temperature": 1.5}, {"temperature": 1.5, "repetition_penalty": 1.9}),
            ],
        ),
        (DRAWING, {}, [({}, {"temperature": 1.0, "top_k": 3}), ({"temperature": 0}, GREEDY)]),
        (
            DRAWING,
            {"temperature": 0.5, "top_k": 2},
            [({}, {"temperature": 0.5, "top_k": 2}), ({"temperature": 2}, {"temperature": 2, "top_k": 2})],
        ),
    ],
)
def test_a_request_comes_before_the_flags_and_these_before_the_models_own(tmp_path, authors, flags, cases):
    own = {} if authors is None else {"generation_config": authors}
    tiny, config = Tiny.random([(8, 8)], context_length=600), {"chat_template": TEMPLATE}
    bundle = write_bundle(tmp_path / "tiny", tiny, "fused", tokenizer=letters(), tokenizer_config=config, **own).path
    with running(bundle, defaults=flags) as served:
        model, chat = served.model, [{"role": "user", "content": "hi"}]
        for asked, expected in cases:
            asked = {"max_tokens": 12, "seed": 3, **asked}
            text = model.generate("abc", max_new_tokens=12, seed=3, **expected).text
            assert served.ask("/v1/completions", {"prompt": "abc", **asked})[1]["choices"][0]["text"] == text
            answer = model.generate_chat(chat, max_new_tokens=12, seed=3, **expected).text
            reply = served.ask("/v1/chat/completions", {"messages": chat, **asked})[1]
            assert reply["choices"][0]["message"]["content"] == answer
        assert served.ask("/props")[1]["defaults"].items() >= flags.items()
