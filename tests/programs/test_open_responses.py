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
    "multi-turn": [HELLO, {"type": "message", "role": "assistant", "content": "Hello Alice!"}, HELLO],
    "parts": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
}
WARM = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
TOOL = {"type": "function", "name": "get_weather", "parameters": WARM | {"additionalProperties": False}}
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


def require_fields(response: dict[str, Any], *, ended: bool = True) -> None:
    assert FIELDS - response.keys() == set()
    assert response["object"] == "response"
    assert response["truncation"] in ("auto", "disabled")
    assert response["text"]["format"]["type"] == "text"
    if not ended:
        assert (response["status"], response["output"], response["usage"]) == ("in_progress", [], None)
        return
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"].keys() == {"cached_tokens"}
    assert usage["output_tokens_details"].keys() == {"reasoning_tokens"}
    assert isinstance(response["completed_at"], int)
    assert (response["status"] == "incomplete") == (response["incomplete_details"] is not None)


@pytest.mark.parametrize("case", CASES)
def test_a_response_has_every_field(case, address):
    response = post(address, "/v1/responses", {**COMMON, "input": CASES[case]})
    require_fields(response)
    (message,) = response["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "incomplete")
    (part,) = message["content"]
    assert (part["type"], part["annotations"], part["logprobs"]) == ("output_text", [], [])
    assert part["text"]
    assert response["usage"]["output_tokens"] == 8


# The events of an item, without their beginning "response."; those of its parts may be many.
BEGIN = ["created", "in_progress", "output_item.added"]
TEXT = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
CALL = ["function_call_arguments.delta", "function_call_arguments.done"]


@pytest.mark.parametrize("calls", [False, True])
def test_the_events_of_a_text_and_of_a_required_call_have_their_order_and_fields(calls, address):
    if calls:
        pytest.importorskip("llguidance", reason="llguidance is not installed")
    given: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 200} if calls else {}
    created, progress, added, *parts, done, last = events = events_of(address, input=[HELLO], **given)
    kinds = [event["type"].removeprefix("response.") for event in events]
    end = "completed" if calls else "incomplete"
    assert [*dict.fromkeys(kinds)] == [*BEGIN, *(CALL if calls else TEXT), "output_item.done", end]
    for event in (created, progress):
        require_fields(event["response"], ended=False)
    require_fields(last["response"])
    assert last["response"]["output"] == [done["item"]]
    assert {event["response"]["id"] for event in (created, progress, last)} == {created["response"]["id"]}
    assert added["item"]["status"] == "in_progress"
    assert {(event["item_id"], event["output_index"]) for event in parts} == {(added["item"]["id"], 0)}
    written, item = "".join(event["delta"] for event in parts if "delta" in event), done["item"]
    if calls:
        assert (item["type"], item["name"], item["status"]) == ("function_call", "get_weather", "completed")
        assert item["call_id"] not in ("", item["id"])
        assert written == item["arguments"] == parts[-1]["arguments"]
        assert isinstance(json.loads(written)["warm"], bool)
        assert last["response"]["tools"][0].items() >= TOOL.items()
    else:
        assert written == parts[-2]["text"] == parts[-1]["part"]["text"] == item["content"][0]["text"]


def test_an_image_is_refused_by_name(address):
    image = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, "/v1/responses", {**COMMON, "input": [{"role": "user", "content": [image]}]})
    assert refused.value.code == 400
    assert "input.0" in json.load(refused.value)["error"]["param"]
