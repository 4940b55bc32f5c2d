"""Chat completions and responses: the fields of strict clients, whole and as events."""

import pytest

from ..conftest import CHAT, HI, RENDERED, RESPONSES, TOOL, running


def asked(server, **options):
    """The first choice."""
    return server.choices(CHAT, messages=HI, **options)[0]


def streamed(server, **options):
    """The choices of the events."""
    *chunks, done = server.events(CHAT, {"messages": HI, **options})
    assert done == "[DONE]"
    return [choice for chunk in chunks for choice in chunk["choices"]]


def test_an_answer_has_every_field_and_is_the_runtimes(served):
    expected = served.model.generate_chat(HI, max_new_tokens=6)
    status, reply = served.ask(CHAT, {"model": "tiny", "messages": HI, "max_tokens": 6})
    assert (status, reply["object"], reply["model"]) == (200, "chat.completion", "tiny")
    assert (reply["id"][:9], reply["system_fingerprint"][0]) == ("chatcmpl-", "b")
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(RENDERED), 6, 26)
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert served.choices("/chat/completions", messages=HI, max_tokens=6) == reply["choices"]


def test_a_stream_has_the_role_once_the_same_text_one_end_and_the_usage(served):
    body = {"messages": HI, "max_completion_tokens": 6, "stream_options": {"include_usage": True}}
    whole = served.ask(CHAT, {"messages": HI, "max_tokens": 6})[1]
    *chunks, usage, done = served.events(CHAT, body)
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all(chunk["usage"] is None and chunk["id"] == usage["id"] for chunk in chunks)
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": None, "refusal": None}
    assert all(choice["delta"].keys() == {"content"} and choice["delta"]["content"] for choice in middle)
    assert (last["delta"], last["finish_reason"]) == ({}, "length")
    text = "".join(choice["delta"]["content"] for choice in middle)
    assert text == whole["choices"][0]["message"]["content"]
    assert "usage" not in served.events(CHAT, {"messages": HI, "max_tokens": 1})[0]


def test_several_answers_differ_by_their_seeds_and_a_seed_repeats_them(served):
    body = {"max_tokens": 8, "n": 3, "temperature": 1.5, "seed": 4}
    first, again = (served.choices(CHAT, messages=HI, **body) for _ in range(2))
    assert first == again
    assert [choice["index"] for choice in first] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in first]
    assert len({*texts}) > 1
    parts = ["", "", ""]
    for choice in streamed(served, **body):
        parts[choice["index"]] += choice["delta"].get("content") or ""
    assert parts == texts


def test_log_probabilities_have_bytes_that_join_to_the_text(served):
    body = {"max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    choice = asked(served, **body)
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["token"] == one["token"] for one in content)
    told = (part["logprobs"] or {"content": []} for part in streamed(served, **body))
    assert [one for part in told for one in part["content"]] == content


def test_stop_bias_and_penalties_reach_the_sampler(served):
    text = asked(served, max_tokens=9)["message"]["content"]
    stopped = asked(served, max_tokens=9, stop=[text[-1]])
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[: text.index(text[-1])], "stop")
    assert asked(served, max_tokens=3, logit_bias={"3": 100})["message"]["content"] == "ddd"


def test_what_cannot_change_the_answer_is_accepted(served):
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "id_slot": 1}
    ignored |= {"seed": -1, "parallel_tool_calls": True, "cache_prompt": True, "top_k": None, "made_up": None}
    assert asked(served, max_tokens=1, **ignored)


def test_a_tool_call_is_apart_from_the_content(calling):
    choice = asked(calling, tools=[TOOL], max_tokens=150)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "so")
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "wet", "arguments": '{"a": 1}'}] * 2
    assert [(call["type"], len(call["id"])) for call in calls] == [("function", 9)] * 2


def test_a_streamed_tool_call_comes_whole_and_is_no_content(calling):
    choices = streamed(calling, tools=[TOOL], max_tokens=150)
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == "so"
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert [(part["index"], part["function"].get("name")) for part in parts if "id" in part] == [(0, "wet"), (1, "wet")]
    for index in range(2):
        assert [part["function"]["arguments"] for part in parts if part["index"] == index] == ['{"a": 1}']
    assert choices[-1]["finish_reason"] == "tool_calls"


def schema_of(value):
    """Of an object whose one field this is."""
    return {"type": "object", "properties": {"a": value}, "required": ["a"], "additionalProperties": False}


def test_a_call_can_be_asked_for_and_forbidden(served):
    pytest.importorskip("llguidance")
    tool = {"type": "function", "function": {"name": "wet", "parameters": schema_of({"const": 1})}}
    for choice in ("required", {"type": "function", "function": {"name": "wet"}}):
        (call,) = asked(served, tools=[tool], tool_choice=choice)["message"]["tool_calls"]
        assert call["function"] == {"name": "wet", "arguments": '{"a": 1}'}
    body = {"messages": HI, "tools": [tool], "max_tokens": 2, "tool_choice": "none"}
    assert served.ask(CHAT, body)[1]["usage"]["prompt_tokens"] == len(RENDERED)
    named = {"type": "function", "function": {"name": "dry"}}
    status, reply = served.ask(CHAT, {**body, "tool_choice": named})
    assert (status, "tool_choice is 'dry'" in reply["error"]["message"]) == (400, True)


def test_json_is_what_the_format_asks_for(served):
    pytest.importorskip("llguidance")
    schema = {"name": "x", "strict": True, "schema": schema_of({"enum": ["b"]})}
    found = asked(served, response_format={"type": "json_schema", "json_schema": schema})
    assert (found["message"]["content"], found["finish_reason"]) == ('{"a": "b"}', "stop")


# --- responses: the same answers, in items and events with numbers --------------------------------------------------
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
    assert (reply["metadata"], reply["top_logprobs"]) == ({}, 0)
    body = {"input": HI, "max_output_tokens": 1, "metadata": {"a": "b"}, "top_logprobs": 2}
    reply = served.ask(RESPONSES, body)[1]
    assert (reply["metadata"], reply["top_logprobs"]) == ({"a": "b"}, 2)
