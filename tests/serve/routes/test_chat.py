"""Chat completions: what strict clients want, whole and as events."""

from __future__ import annotations

import pytest

from ...runtime.conftest import Tiny, write_bundle
from ..conftest import CALL, TOOL, letters, running

HI = [{"role": "user", "content": "hi"}]
RENDERED = "<user>hi.<assistant>"
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
    ignored |= {"parallel_tool_calls": True, "cache_prompt": True, "top_k": None, "made_up": None}
    assert served.ask(PATH, {"messages": HI, "max_tokens": 1, **ignored})[0] == 200


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"functions": []}, 400, "functions", "not known, or not supported"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "valid boolean"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", "image_url"),
        ({"messages": [{"role": "user", "content": "hi" * 600}]}, 400, "messages", "maximum context length is 600"),
        ({"messages": [{"role": "user", "content": "日"}]}, 400, None, "no token covers"),
        ({"model": "gpt-9"}, 404, "model", "'gpt-9' is not here"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"99": 1}}, 400, "logit_bias", "99"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"tool_choice": "required"}, 400, "tool_choice", "no tools"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type", "'text'"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "no json_schema"),
        ({"chat_template_kwargs": {"mood": 1}}, 400, None, "does not read 'mood'"),
    ],
)
def test_a_wrong_field_is_named(served, change, status, param, said):
    found, reply = served.ask(PATH, {"messages": HI, "max_tokens": 1, **change})
    error = reply["error"]
    assert (found, error["param"]) == (status, param)
    assert said in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokenizer": letters(), "tokenizer_config": {}}, "own has no chat template"),
        ({"tokenizer": letters(), "tokenizer_config": {"chat_template": {"rag": "x"}}}, "own has chat templates named"),
        ({}, "own has no tokenizer"),
    ],
)
def test_a_client_is_told_the_models_name_and_not_its_path(tmp_path, fields, said):
    folder = tmp_path / "private place"
    write_bundle(folder, Tiny.random([(8, 8)], context_length=24), "fused", **fields)
    with running(folder, names=("own",)) as served:
        for path, body in (
            (PATH, {"messages": HI}),
            ("/apply-template", {"messages": HI}),
            ("/responses", {"input": "hi"}),
        ):
            status, reply = served.ask(path, body)
            assert status == 400
            assert reply["error"]["message"].startswith(said)
            assert "private place" not in str(reply)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": NaN}', b"\xff", b"[" * 100_000, b'"\\ud800"'])
def test_a_body_that_is_no_object_is_told(served, body):
    status, reply = served.ask(PATH, body)
    assert status == 400
    assert reply["error"]["message"].startswith("the body is not ")


@pytest.fixture(scope="module")
def calling(saying):
    with running(saying("wet." + RENDERED, "so " + CALL)) as found:
        yield found


def test_a_tool_call_is_apart_from_the_content(calling):
    choice = calling.ask(PATH, {"messages": HI, "tools": [TOOL], "max_tokens": 90})[1]["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "so"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "wet", "arguments": '{"a": 1}'})
    assert len(call["id"]) == 9


def test_a_streamed_tool_call_comes_in_parts_and_is_no_content(calling):
    *chunks, _ = calling.events(PATH, {"messages": HI, "tools": [TOOL], "max_tokens": 90})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "so"
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert all(part["index"] == 0 for part in parts)
    assert [part["function"].get("name") for part in parts if "id" in part] == ["wet"]
    assert "id" in parts[0]
    assert len(parts) > 2
    assert "".join(part["function"]["arguments"] for part in parts) == '{"a": 1}'
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
    status, reply = served.ask(
        PATH, {"messages": HI, "json_schema": {"type": "object", "minProperties": 2, "maxProperties": 1}}
    )
    assert (status, "json_schema" in reply["error"]["message"]) == (400, True)
