"""Chat completions: what strict clients want, whole and as events."""

from __future__ import annotations

import pytest

from ..conftest import RENDERED, TOOL

HI = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


def test_an_answer_has_every_field_and_is_the_runtimes(served):
    expected = served.model.generate_chat(HI, max_new_tokens=6)
    status, reply = served.ask(PATH, {"model": "tiny", "messages": HI, "max_tokens": 6})
    assert status == 200
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    assert reply["system_fingerprint"].startswith("b")
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(RENDERED), 6, 26)
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert served.ask("/chat/completions", {"messages": HI, "max_tokens": 6})[1]["choices"] == reply["choices"]


def test_a_stream_has_the_role_once_the_same_text_one_end_and_the_usage(served):
    body = {"messages": HI, "max_completion_tokens": 6, "stream_options": {"include_usage": True}}
    whole = served.ask(PATH, {"messages": HI, "max_tokens": 6})[1]
    *chunks, usage, done = served.events(PATH, body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(chunk["usage"] is None and chunk["id"] == usage["id"] for chunk in chunks)
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": None, "refusal": None}
    assert all(choice["delta"].keys() == {"content"} and choice["delta"]["content"] for choice in middle)
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    text = "".join(choice["delta"]["content"] for choice in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert "usage" not in served.events(PATH, {"messages": HI, "max_tokens": 1})[0]


def test_several_answers_differ_by_their_seeds_and_a_seed_repeats_them(served):
    body = {"messages": HI, "max_tokens": 8, "n": 3, "temperature": 1.5, "seed": 4}
    first, again = (served.ask(PATH, body)[1]["choices"] for _ in range(2))
    assert first == again
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in first}) > 1
    streamed = ["", "", ""]
    for chunk in served.events(PATH, body)[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == [choice["message"]["content"] for choice in first]


def test_log_probabilities_have_bytes_that_join_to_the_text(served):
    body = {"messages": HI, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    choice = served.ask(PATH, body)[1]["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["token"] == one["token"] for one in content)
    streamed = [
        one
        for chunk in served.events(PATH, body)[:-1]
        for choice in chunk["choices"]
        for one in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


def test_stop_bias_and_penalties_reach_the_sampler(served):
    text = served.ask(PATH, {"messages": HI, "max_tokens": 9})[1]["choices"][0]["message"]["content"]
    stopped = served.ask(PATH, {"messages": HI, "max_tokens": 9, "stop": [text[-1]]})[1]["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[: text.index(text[-1])], "stop")
    biased = served.ask(PATH, {"messages": HI, "max_tokens": 3, "logit_bias": {"3": 100}})[1]["choices"][0]
    assert biased["message"]["content"] == "ddd"


def test_what_cannot_change_the_answer_is_accepted(served):
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "id_slot": 1}
    ignored |= {"seed": -1, "parallel_tool_calls": True, "cache_prompt": True, "top_k": None, "made_up": None}
    assert served.ask(PATH, {"messages": HI, "max_tokens": 1, **ignored})[0] == 200


def test_a_tool_call_is_apart_from_the_content(calling):
    choice = calling.ask(PATH, {"messages": HI, "tools": [TOOL], "max_tokens": 150})[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "so"
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "wet", "arguments": '{"a": 1}'}] * 2
    assert [(call["type"], len(call["id"])) for call in calls] == [("function", 9)] * 2


def test_a_streamed_tool_call_comes_in_parts_and_is_no_content(calling):
    *chunks, _ = calling.events(PATH, {"messages": HI, "tools": [TOOL], "max_tokens": 150})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "so"
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert [(part["index"], part["function"].get("name")) for part in parts if "id" in part] == [(0, "wet"), (1, "wet")]
    for index in range(2):
        own = [part["function"]["arguments"] for part in parts if part["index"] == index]
        assert len(own) > 2
        assert "".join(own) == '{"a": 1}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_can_be_asked_for_and_forbidden(served):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "wet", "parameters": schema}}
    for choice in ("required", {"type": "function", "function": {"name": "wet"}}):
        found = served.ask(PATH, {"messages": HI, "tools": [tool], "tool_choice": choice})[1]["choices"][0]
        assert found["message"]["tool_calls"][0]["function"] == {"name": "wet", "arguments": '{"a": 1}'}
    body = {"messages": HI, "tools": [tool], "max_tokens": 2, "tool_choice": "none"}
    assert served.ask(PATH, body)[1]["usage"]["prompt_tokens"] == len(RENDERED)
    named = {"type": "function", "function": {"name": "dry"}}
    status, reply = served.ask(PATH, {**body, "tool_choice": named})
    assert (status, "tool_choice is 'dry'" in reply["error"]["message"]) == (400, True)


def test_json_is_what_the_format_asks_for(served):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    found = served.ask(PATH, {"messages": HI, "response_format": asked})[1]["choices"][0]
    assert (found["message"]["content"], found["finish_reason"]) == ('{"a": "b"}', "stop")
