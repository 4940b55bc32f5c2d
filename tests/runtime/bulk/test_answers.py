"""Answers in both forms, of JSON's types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pastkey.bundle import Bundle
from pastkey.runtime import Completion, TokenLogprob
from pastkey.runtime.bulk.answers import openai_answer, openai_error, openai_row, plain_answer, plain_error
from pastkey.runtime.bulk.requests import FIELDS
from pastkey.runtime.text.codec import TextCodec

LOGPROBS = [TokenLogprob(0, -0.5, [(0, -0.5), (26, -1.5)])]
DONE = Completion("a", [0], "stop_string", 3, 1, 0.1, 0.2, logprobs=LOGPROBS)


def made(said: dict[str, Any] | None, codec: TextCodec | None = None, logprobs: bool = False) -> dict[str, Any]:
    answer = openai_answer("x", DONE, said, model="m", created=5, logprobs=logprobs, codec=codec)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 200
    body: dict[str, Any] = answer["response"]["body"]
    assert (body["model"], body["created"]) == ("m", 5)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return body


def test_a_plain_answer_has_its_fields_and_what_was_asked_for() -> None:
    expected = {"text": "a", "finish_reason": "stop_string", "prompt_tokens": 3, "new_tokens": 1, "error": None}
    assert plain_answer(DONE) == expected
    assert plain_answer(DONE, logprobs=True, tools=True) == {
        **expected,
        "logprobs": [{"id": 0, "logprob": -0.5, "top": [(0, -0.5), (26, -1.5)]}],
        "tool_calls": [],
    }
    assert list(plain_error("bad")) == list(FIELDS)
    assert plain_error("bad")["error"] == "bad"


def test_a_conversations_answer_is_a_message() -> None:
    body = made({"role": "assistant", "content": "a"})
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "a"}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_tool_calls_have_their_arguments_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"é": [1, float("nan")]}}}
    (choice,) = made({"role": "assistant", "content": "", "tool_calls": [call]})["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": '{"é": [1, null]}'}}]


def test_log_probabilities_show_tokens_as_text(speaking_bundle: Bundle) -> None:
    assert speaking_bundle.tokenizer is not None
    codec = TextCodec.from_file(Path(speaking_bundle.tokenizer))
    (choice,) = made({"role": "assistant", "content": "a"}, codec, True)["choices"]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.5, "bytes": [97]},
                    {"token": "é", "logprob": -1.5, "bytes": [195, 169]},
                ],
            }
        ]
    }
    (choice,) = made(None, codec, True)["choices"]
    assert choice["text"] == "a"
    assert choice["logprobs"]["tokens"] == ["a"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -0.5, "é": -1.5}]
    (choice,) = made(None, None, True)["choices"]
    assert choice["logprobs"]["tokens"] == ["0"]


def test_an_error_of_openais_form_is_told_twice() -> None:
    row = openai_row("x", openai_error("x", "bad"))
    assert row["custom_id"] == "x"
    assert row["id"].startswith("batch_req_")
    assert row["error"] == {"code": "invalid_request_error", "message": "bad"}
    assert row["response"]["status_code"] == 400
    assert row["response"]["body"]["error"]["message"] == "bad"
    assert openai_row("x", {})["id"] == row["id"] != openai_row("y", {})["id"]
