from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime import Chunk, Completion, Score, TokenLogprob
from pastkey.runtime.sandbox.protocol import Reply, Step
from pastkey.typed import parse

LOGPROB = TokenLogprob(3, -0.1, [(3, -0.1), (7, -2.5)])
COMPLETION = Completion(
    "text", [3, 4], "stop_string", 5, 2, 0.25, 0.5, 1, "stop",
    draft_tokens=3, accepted_tokens=2, logprobs=[LOGPROB, LOGPROB], prompt_logprobs=[None, LOGPROB], forced_tokens=1,
)  # fmt: skip


@pytest.mark.parametrize("value", [Step(5, Chunk("te", [3], [LOGPROB])), Step(whole=COMPLETION), Score([1], [None], 0)])
def test_what_is_sent_comes_back_equal(value):
    assert parse(type(value), json.loads(json.dumps(asdict(value)))) == value


def piece(**fields: Any) -> dict[str, Any]:
    return {"piece": {"text": "a", "ids": [1], **fields}}


def logprob(**fields: Any) -> dict[str, Any]:
    return piece(logprobs=[{"id": 1, "logprob": -1.0, "top": [], **fields}])


def whole(**fields: Any) -> dict[str, Any]:
    return {"whole": {**asdict(COMPLETION), **fields}}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Step, piece(text=3)),
        (Step, piece(ids=[True])),
        (Step, piece(ids=["1"])),
        (Step, piece(ids=1)),
        (Step, piece(more=1)),
        (Step, logprob(logprob=float("nan"))),
        (Step, logprob(logprob=10**400)),
        (Step, logprob(top=[[1]])),
        (Step, logprob(top=[[1, -1.0, 2]])),
        (Step, whole(finish_reason="because")),
        (Step, whole(prefill_seconds=float("inf"))),
        (Step, whole(tool_calls=[{"name": "f", "arguments": {}}])),
        (Score, {"ids": [1, 2], "logprobs": [None, "1.5"], "total": 0}),
        (Reply, {"id": "1"}),
        (Reply, {"id": 1, "failure": {"kind": "InputError"}}),
    ],
)
def test_anything_else_is_no_answer(kind, value):
    with pytest.raises(InputError):
        parse(kind, value)
