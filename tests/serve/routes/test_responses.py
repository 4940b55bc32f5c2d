"""Responses: the same answers as chat completions, in items and events with numbers."""

from __future__ import annotations

import pytest

from ..conftest import CHAT, HI, RENDERED, RESPONSES, TOOL, running

TEXT = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done",
    "response.output_item.done",
]  # fmt: skip


def test_an_answer_is_that_of_chat(served):
    chat = served.ask(CHAT, {"messages": HI, "max_tokens": 5})[1]
    for given in ("hi", [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]):
        status, reply = served.ask(RESPONSES, {"input": given, "max_output_tokens": 5})
        assert (status, reply["object"], reply["status"]) == (200, "response", "incomplete")
        assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
        (item,) = reply["output"]
        assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
        assert reply["usage"]["total_tokens"] == chat["usage"]["total_tokens"]


def test_the_events_are_in_order_and_end_with_the_whole(served):
    body = {"input": "hi", "max_output_tokens": 3, "instructions": "so"}
    *events, done = served.events(RESPONSES, body)
    assert done == "[DONE]"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert list(dict.fromkeys(event["type"] for event in events)) == [*TEXT, "response.incomplete"]
    final = events[-1]["response"]
    assert final["output"][0]["content"][0]["text"] == "".join(event.get("delta", "") for event in events)
    assert final["output"][0] == events[-2]["item"]
    plain = served.ask(RESPONSES, body)[1]
    assert plain["output"][0]["content"] == final["output"][0]["content"]
    assert plain.keys() == final.keys()


@pytest.mark.parametrize(("answer", "text"), [("abQ", "a"), ("bQ", "")])
def test_tokens_without_a_text_at_the_end_have_log_probabilities(saying, answer, text):
    """Those of a stop string, here."""
    body = {"input": "hi", "include": ["message.output_text.logprobs"]}
    with running(saying(RENDERED, answer), defaults={"temperature": 0.0, "stop": ["bQ"]}) as served:
        (part,) = served.ask(RESPONSES, body)[1]["output"][0]["content"]
        *events, _ = served.events(RESPONSES, body)
    assert (part["text"], [one["token"] for one in part["logprobs"]]) == (text, list(answer))
    assert events[-1]["response"]["output"][0]["content"] == [part]
    assert [one for event in events if "delta" in event for one in event["logprobs"]] == part["logprobs"]


def test_a_call_is_an_item_of_its_own(calling):
    body = {"input": "hi", "tools": [{"type": "function", **TOOL["function"]}], "max_output_tokens": 150}
    reply = calling.ask(RESPONSES, body)[1]
    *events, _ = calling.events(RESPONSES, body)
    said, call, _ = reply["output"]
    assert (said["content"][0]["text"], call["name"], call["arguments"]) == ("so", "wet", '{"a": 1}')
    assert reply["status"] == call["status"] == "completed"
    streamed = events[-1]["response"]["output"]
    assert [one["type"] for one in streamed] == ["message", "function_call", "function_call"]
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    for place in (1, 2):
        written = "".join(event["delta"] for event in deltas if event["output_index"] == place)
        assert written == '{"a": 1}' == streamed[place]["arguments"]


def test_calls_and_their_results_go_on(served):
    items = [
        *HI,
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c", "name": "wet", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "so"},
    ]
    reply = served.ask(RESPONSES, {"input": items, "max_output_tokens": 2})[1]
    assert reply["usage"]["input_tokens"] == len("<user>hi.<assistant>.<tool>so.<assistant>")
