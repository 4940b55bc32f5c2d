"""The cases of the Open Responses compliance test that need neither images nor a model that calls tools by itself.

Written from its public specification (openresponses.org): fields of a response, order and fields of its events. Two of
its cases call tools; here the call is required, so that any model makes it.
"""

from __future__ import annotations

import json
import urllib.error
from typing import Any

import pytest

from .serving import MODEL, post, serving, write_tiny

pytest.importorskip("starlette", reason="the extra serve is not installed")

pytestmark = pytest.mark.slow

# Of a response: the required fields.
FIELDS = {
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id",
    "instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p",
    "presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage",
    "max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier",
    "prompt_cache_key",
}  # fmt: skip
HELLO = {"type": "message", "role": "user", "content": "Say hello in exactly 3 words."}
CASES: dict[str, list[dict[str, Any]]] = {
    "basic": [HELLO],
    "system prompt": [{"type": "message", "role": "system", "content": "You are a pirate."}, HELLO],
    "multi-turn": [
        {"type": "message", "role": "user", "content": "My name is Alice."},
        {"type": "message", "role": "assistant", "content": "Hello Alice!"},
        {"type": "message", "role": "user", "content": "What is my name?"},
    ],
    "parts": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    },
}
COMMON = {"model": MODEL, "max_output_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with serving(write_tiny(folder / "bundle").path, "--alias", MODEL, log=folder / "log") as address:
        yield address


def events_of(address: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that its data has, numbered from 0."""
    text = post(address, "/v1/responses", {**COMMON, **body, "stream": True})
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    assert blocks.pop() == ["data: [DONE]"]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def require_fields(response: dict[str, Any]) -> None:
    assert FIELDS - response.keys() == set()
    assert response["object"] == "response"
    assert isinstance(response["created_at"], int)
    assert response["truncation"] in ("auto", "disabled")
    assert response["text"]["format"]["type"] == "text"
    assert isinstance(response["metadata"], dict)


def require_end(response: dict[str, Any]) -> None:
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert isinstance(usage["input_tokens_details"]["cached_tokens"], int)
    assert isinstance(usage["output_tokens_details"]["reasoning_tokens"], int)
    assert isinstance(response["completed_at"], int)
    assert (response["status"] == "incomplete") == (response["incomplete_details"] is not None)


@pytest.mark.parametrize("case", CASES)
def test_a_response_has_every_field(case, address):
    response = post(address, "/v1/responses", {**COMMON, "input": CASES[case]})
    require_fields(response)
    require_end(response)
    (message,) = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    (part,) = message["content"]
    assert (part["type"], part["annotations"], part["logprobs"]) == ("output_text", [], [])
    assert part["text"]
    assert response["usage"]["output_tokens"] == 8


def test_the_events_of_a_text_have_their_order_and_fields(address):
    whole = post(address, "/v1/responses", {**COMMON, "input": [HELLO]})
    events = events_of(address, input=[HELLO])
    kinds = [event["type"] for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    created, progress, added, part, *rest = events
    for event in (created, progress):
        require_fields(event["response"])
        assert event["response"]["status"] == "in_progress"
        assert event["response"]["output"] == []
        assert event["response"]["usage"] is None
    assert added["item"]["status"] == "in_progress"
    assert added["item"]["content"] == []
    assert part["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    for event in (part, *rest[:-2]):
        assert (event["item_id"], event["output_index"], event["content_index"]) == (added["item"]["id"], 0, 0)
    text = "".join(event["delta"] for event in rest[:deltas])
    assert text == rest[deltas]["text"] == rest[deltas + 1]["part"]["text"] == whole["output"][0]["content"][0]["text"]
    last = events[-1]["response"]
    require_fields(last)
    require_end(last)
    assert last["output"] == [events[-2]["item"]]
    assert {event["response"]["id"] for event in (created, progress, events[-1])} == {created["response"]["id"]}


def test_the_events_of_a_required_tool_call_have_their_order_and_fields(address):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    given = {"input": [HELLO], "tools": [TOOL], "tool_choice": "required", "max_output_tokens": 200}
    events = events_of(address, **given)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("response.function_call_arguments.delta")
    assert deltas
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    item = events[-2]["item"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
    assert item["call_id"]
    assert item["id"] != item["call_id"]
    arguments = "".join(event["delta"] for event in events[3 : 3 + deltas])
    assert arguments == item["arguments"] == events[-3]["arguments"]
    assert isinstance(json.loads(arguments)["warm"], bool)
    (echoed,) = events[-1]["response"]["tools"]
    assert {**echoed, **TOOL} == echoed


def test_an_image_is_refused_by_name(address):
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, "/v1/responses", {**COMMON, "input": [{"role": "user", "content": [image]}]})
    assert refused.value.code == 400
    assert "input.0" in json.load(refused.value)["error"]["param"]
