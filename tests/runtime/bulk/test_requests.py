"""What a row asks for, in each form, and what is wrong with one that cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pastkey.errors import InputError
from pastkey.runtime.bulk.requests import Request, form_of, is_openai, parse_request, row_id, seed_of

HI = [{"role": "user", "content": "Hi"}]


def body(url: str = "/v1/chat/completions", **parameters: Any) -> dict[str, Any]:
    given = {"messages": HI} if "chat" in url else {"prompt": "Hi"}
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **given, **parameters}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 7, "custom_id": "a"}, 7),
        ({"custom_id": "a"}, "a"),
        ({"id": None, "custom_id": "a"}, "a"),
        ({"id": "5"}, "5"),
        ({"id": 5.0}, "line-3"),
        ({"id": True}, "line-3"),
        ({"id": [1]}, "line-3"),
        ({}, "line-3"),
        (None, "line-3"),
    ],
)
def test_a_row_is_known_by_its_id_or_by_its_place(row: dict[str, Any] | None, expected: object) -> None:
    assert row_id(row, 3) == expected


def test_the_seed_of_a_row_is_that_of_its_id_and_of_the_jobs_alone() -> None:
    """Known answers: another program, or a later release, must come to the same."""
    assert seed_of(0, "a") == 8377945124198355113
    found = [seed_of(seed, identity) for seed in (0, 1) for identity in ("1", 1, "é", ["no id", "x", None])]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Once"}, Request("Once")),
        ({"prompt": [1, 2], "top_k": 3, "stop": None}, Request([1, 2], options={"top_k": 3})),
        ({"messages": HI, "seed": 5}, Request(messages=HI, options={"seed": 5})),
        ({"prompt": "a", "logit_bias": {"3": -1.5}}, Request("a", options={"logit_bias": {3: -1.5}})),
        (
            {"messages": [{"role": "user", "content": "Hi", "name": None, "tool_calls": None}], "tools": []},
            Request(messages=HI),
        ),
        (
            body(max_tokens=4, temperature=0.5, stop=["x"], n=1, user="u", seed=None, stream=False),
            Request(
                messages=HI,
                options={"max_new_tokens": 4, "temperature": 0.5, "stop": ["x"]},
                form="chat",
                model="m",
            ),
        ),
        (
            body(max_completion_tokens=4, logprobs=True, top_logprobs=2, response_format={"type": "json_object"}),
            Request(
                messages=HI,
                options={"max_new_tokens": 4, "logprobs": 2, "json_schema": {"type": "object"}},
                form="chat",
                model="m",
            ),
        ),
        (
            body("/v1/completions", logprobs=3, min_tokens=1, top_k=2, echo=False),
            Request("Hi", options={"logprobs": 3, "min_new_tokens": 1, "top_k": 2}, form="completions", model="m"),
        ),
        (body(logprobs=False, response_format={"type": "text"}), Request(messages=HI, form="chat", model="m")),
        (
            body(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}),
            Request(messages=HI, options={"json_schema": {"type": "array"}}, form="chat", model="m"),
        ),
        (body(tools=[{"type": "function"}], tool_choice="none"), Request(messages=HI, form="chat", model="m")),
    ],
)
def test_what_a_row_asks_for(row: dict[str, Any], expected: Request) -> None:
    assert parse_request(row) == expected
    assert form_of(row) == expected.form


def test_the_arguments_of_tool_calls_are_objects_as_templates_take_them() -> None:
    def said(arguments: str) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}, *HI]}

    messages = parse_request(said('{"a": 1}')).messages
    assert messages is not None
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    with pytest.raises(InputError, match="the tool call 1 has arguments that are no JSON"):
        parse_request(said("{"))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"id": 5.5, "prompt": "a"}, "id is 5.5; a text or a whole number was expected"),
        ({"text": "a", "prompt": "a"}, "the row has the field 'text', which the output has"),
        ({"prompt": "a", "logprobs": 2}, "the row has the field 'logprobs'"),
        ({"topic": "a"}, 'neither "prompt" nor "messages"'),
        ({"prompt": "a", "messages": HI}, '"prompt" and "messages"'),
        ({"prompt": 5}, "the prompt is 5; a text or a list of token ids was expected"),
        ({"prompt": ["a", "b"]}, "a text or a list of token ids was expected"),
        ({"prompt": "a", "tools": [{}]}, "tools are for a conversation"),
        ({"messages": []}, "messages is []; a list of at least one message"),
        ({"messages": "Hi"}, "messages is 'Hi'; a list of at least one message"),
        ({"messages": [{"content": "a"}]}, "message 1 is {'content': 'a'}; an object with \"role\""),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 is 3; a text was expected"),
        ({"messages": HI, "tools": {"a": 1}}, "tools is {'a': 1}; a list of JSON schemas was expected"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias is {'x': 1}; an object of token ids and numbers"),
        (body("/v1/embeddings"), "url is '/v1/embeddings'; /v1/chat/completions or /v1/completions was expected"),
        ({**body(), "method": "GET"}, "method is 'GET'; POST was expected"),
        ({**body(), "body": 3}, "body is 3; an object was expected"),
        ({**body(), "body": {"prompt": "a"}}, 'the body has no "messages", which /v1/chat/completions needs'),
        (body(model=3), "model is 3; a text was expected"),
        (body(n=2), "n is 2; 1 is the one value that it may be"),
        (body(stream=True), "stream is True; false is the one value"),
        (body(frobnicate=1), "the body has the parameter 'frobnicate', which is not known here"),
        (body(prompt="a"), "the body has the parameter 'prompt'"),
        (body(logits_processor=1), "the body has the parameter 'logits_processor'"),
        (body(tool_choice="required"), 'tool_choice is \'required\'; "auto" or "none" was expected'),
        (body(response_format={"type": "xml"}), "response_format is {'type': 'xml'}"),
        (body(response_format=3), "response_format is 3"),
        (body(logprobs=3), "logprobs is 3; true or false was expected"),
        (body("/v1/completions", messages=HI), "the body has the parameter 'messages'"),
        (body("/v1/completions", tools=[{}]), "the body has the parameter 'tools'"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        parse_request(row)


def test_a_prompt_beside_a_body_is_no_request_of_openais() -> None:
    assert is_openai({"custom_id": 1, "body": {}})
    assert not is_openai({"prompt": "a", "body": "of a letter"})
    assert form_of({"url": "/v1/nothing", "body": {}}) == "chat"
