"""Tokens and texts."""

from __future__ import annotations

from ..conftest import ids_of


def test_text_becomes_tokens_and_text_again(served):
    assert served.ask("/tokenize", {"content": "so {a}"}) == (200, {"tokens": ids_of("so {a}")})
    assert served.ask("/tokenize", {"content": ""})[1] == {"tokens": []}
    pieces = served.ask("/v1/tokenize", {"content": "so", "with_pieces": True})[1]["tokens"]
    assert [one["piece"] for one in pieces] == ["s", "o"]
    assert served.ask("/detokenize", {"tokens": ids_of("so {a}")}) == (200, {"content": "so {a}"})


def test_the_template_is_applied(served):
    messages = [{"role": "developer", "content": "so"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    status, reply = served.ask("/apply-template", {"messages": messages})
    assert (status, reply) == (200, {"prompt": "<system>so.<user>hi.<assistant>"})
