from __future__ import annotations

import json
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime import Chunk, Completion, TokenLogprob
from pastkey.runtime.sandbox.protocol import Loaded, Piece, Reply, Scored, Step, Whole, as_json
from pastkey.typed import parse

ODD = {"id": 1, "logprob": float("nan"), "ids": [], "logprobs": []}
LOGPROB = TokenLogprob(3, -0.1, [(3, -0.1), (7, -2.5)])
COMPLETION = Completion(
    "text", [3, 4], "stop_string", 5, 2, 0.25, 0.5, 1, "stop",
    draft_tokens=3, accepted_tokens=2, logprobs=[LOGPROB, LOGPROB], prompt_logprobs=[None, LOGPROB], forced_tokens=1,
)  # fmt: skip


def through(kind: type[Any], value: Any) -> Any:
    return parse(kind, json.loads(json.dumps(as_json(value))))


def test_what_a_stream_gives_comes_back_equal() -> None:
    chunk = Chunk("te", [3], [LOGPROB])
    assert through(Step, Step(piece=Piece.of(chunk))).piece.chunk() == chunk
    assert through(Step, Step(whole=Whole.of(COMPLETION))).whole.completion() == COMPLETION
    assert through(Scored, Scored((1, 2), (None, -1.5), -1.5)).score().logprobs == [None, -1.5]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Step, {"piece": {"text": 3, "ids": []}}),
        (Step, {"piece": {"text": "a", "ids": [-1]}}),
        (Step, {"piece": {"text": "a", "ids": [2**40]}}),
        (Step, {"piece": {"text": "a", "ids": [True]}}),
        (Step, {"piece": {"text": "a", "ids": [1], "logprobs": [ODD]}}),
        (Step, {"piece": {"text": "a", "ids": [1], "logprobs": [{**ODD, "logprob": 10**300}]}}),
        (Scored, {"ids": [1, 2], "logprobs": [None, 1.5], "total": 0}),
        (Step, {"piece": {"text": "a", "ids": [1]}, "more": 1}),
        (Step, {"whole": {**as_json(Whole.of(COMPLETION)), "finish_reason": "because"}}),
        (Step, {"whole": {**as_json(Whole.of(COMPLETION)), "new_tokens": -1}}),
        (Step, {"whole": {**as_json(Whole.of(COMPLETION)), "prefill_seconds": float("inf")}}),
        (Loaded, {"manifest": [], "tokenizer": False}),
        (Loaded, {"manifest": {}, "tokenizer": 1}),
        (Reply, {"id": "1"}),
        (Reply, {"id": 1, "failure": {"kind": "InputError"}}),
    ],
)  # fmt: skip
def test_anything_else_is_no_answer(kind: type[Any], value: Any) -> None:
    with pytest.raises(InputError):
        parse(kind, value)
