"""The error of a request names the wrong field: a table of each route."""

import importlib.util
from typing import Any

import pytest

from ..conftest import CHAT, COMPLETIONS, HI, RESPONSES, running, write_tiny

# A request that is answered, which each case changes.
RIGHT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI, "max_tokens": 1},
    COMPLETIONS: {"prompt": "abc", "max_tokens": 1},
    RESPONSES: {"input": "hi", "max_output_tokens": 1},
    "/v1/embeddings": {"input": "abc"},
    "/tokenize": {"content": "so"},
    "/detokenize": {"tokens": [1]},
}
ANY = {"type": "object", "minProperties": 2, "maxProperties": 1}
# The change, the status, the field that the error names, and a key word.
REFUSED: dict[str, list[tuple[dict[str, Any], int, str | None, str]]] = {
    CHAT: [
        ({"functions": []}, 400, "functions", "not known, or not supported"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "valid boolean"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content", "image_url"),
        ({"messages": [{"role": "user", "content": "hi" * 600}]}, 400, "messages", "maximum context length is 600"),
        ({"messages": [{"role": "user", "content": "日"}]}, 400, None, "no token covers"),
        ({"model": "gpt-9"}, 404, "model", "'gpt-9' is not available"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"99": 1}}, 400, "logit_bias", "99"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"messages": ["a"]}, 400, "messages.0", "messages.0: Input should be a valid dictionary"),
        ({"messages": [*HI, {**HI[0], "content": ["a"]}]}, 400, "messages.1.content.0", "should be a valid dictionary"),
        ({"tool_choice": "x"}, 400, "tool_choice", "tool_choice: Input should be 'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function"}}, 400, "tool_choice.function", "tool_choice.function: Field required"),
        ({"tool_choice": "required"}, 400, "tool_choice", "no tools"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type", "'text'"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "no json_schema"),
        ({"chat_template_kwargs": {"mood": 1}}, 400, None, "does not read 'mood'"),
        ({"json_schema": ANY}, 400, None, "json_schema"),
    ],
    COMPLETIONS: [
        ({"prompt": None}, 400, "prompt", "prompt: Field required"),
        ({"prompt": 3}, 400, "prompt", "prompt: Input should be a valid string"),
        ({"prompt": []}, 400, "prompt", "List should have at least 1 item after validation, not 0"),
        ({"prompt": [-1]}, 400, "prompt.0", "prompt.0: Input should be greater than or equal to 0"),
        ({"prompt": ["a", 3]}, 400, "prompt.0", "prompt.0: Input should be a valid integer"),
        ({"prompt": [[1], ["a"]]}, 400, "prompt.1.0", "prompt.1.0: Input should be a valid integer"),
        ({"n": "x"}, 400, "n", "n: Input should be a valid integer"),
        ({"stop": 3}, 400, "stop", "stop: Input should be a valid string"),
        ({"prompt": [99]}, 400, None, "99"),
        ({"prompt": [[1], []]}, 400, None, "prompt"),
        ({"prompt": [10**30]}, 400, None, ""),
        ({"prompt": "abc" * 300}, 400, "prompt", "maximum context length is 600"),
        ({"prompt": ["abc"] * 513, "n": 2}, 400, None, "the request asks for 1026 texts; at most 1024 at once"),
        ({"suffix": "x"}, 400, "suffix", "not supported"),
        ({"best_of": 3}, 400, "best_of", "not supported"),
        ({"echo": True, "logprobs": 1, "stream": True}, 400, "stream", "not streamed"),
        ({"regex": "("}, 400, None, "regex"),
        ({"seed": -5}, 400, None, "seed is -5"),
    ],
    RESPONSES: [
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", ""),
        ({"conversation": "c"}, 400, "conversation", ""),
        ({"background": True}, 400, "background", "stores nothing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0", ""),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input.0", ""),
        ({"input": [{"type": "function_call", "name": "x"}]}, 400, "input.0", ""),
        ({"input": [{"role": "king", "content": "hi"}]}, 400, "input", ""),
        ({"tool_choice": 3}, 400, "tool_choice", ""),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0.type", ""),
        ({"truncation": "auto"}, 400, "truncation", ""),
    ],
    "/v1/embeddings": [
        ({"dimensions": 3}, 400, "dimensions", ""),
        ({"input": ""}, 400, None, ""),
        ({"input": []}, 400, "input", ""),
        ({"input": [[1], [-1]]}, 400, "input.1.0", "input.1.0: Input should be greater than or equal to 0"),
        ({"input": "a" * 700}, 400, None, "context"),
        ({"model": "gpt-9"}, 404, "model", "'gpt-9' is not available"),
    ],
    "/tokenize": [({"with_pieces": "yes"}, 400, "with_pieces", "valid boolean")],
    "/detokenize": [({"tokens": [99]}, 400, None, "from 0 to 36"), ({"tokens": [10**20]}, 400, None, "")],
}
CASES = [(path, *case) for path, cases in REFUSED.items() for case in cases]


@pytest.mark.parametrize(("path", "change", "status", "param", "word"), CASES)
def test_a_wrong_field_is_named(served, path, change, status, param, word):
    if not importlib.util.find_spec("llguidance") and change.keys() & {"regex", "json_schema"}:
        pytest.skip("llguidance is not installed")
    found, reply = served.ask(path, RIGHT[path] | change)
    error = reply["error"]
    assert (found, error["param"] if param else None) == (status, param)
    assert word in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", RIGHT)
def test_what_each_case_changes_is_answered_and_a_null_is_an_absent_field_whatever_its_name(served, path):
    assert served.ask(path, RIGHT[path] | {"seed": None, "suffix": None})[0] == 200


BODIES = [
    b"", b"{", b"null", b"[]", b'"a"', b'{"messages": NaN}', b'{"a": Infinity}', b"\xff", b"[" * 100_000, b'"\\ud800"'
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_is_no_object_is_told(served, body):
    status, reply = served.ask(CHAT, body)
    assert (status, reply["error"]["message"][:16]) == (400, "the body is not ")


LACKING = {
    "own has no chat template": {"tokenizer_config": {}},
    "own has chat templates named": {"tokenizer_config": {"chat_template": {"rag": "x"}}},
    "own has no tokenizer": {"tokenizer": None},
    "it writes more than 4,000,000 characters": {"tokenizer_config": {"chat_template": "{{ 'x' * 5000000 }}"}},
}


@pytest.mark.parametrize(("said", "fields"), LACKING.items())
def test_a_client_is_told_the_models_name_and_not_its_path(tmp_path, said, fields):
    asked = ((CHAT, {"messages": HI}), ("/apply-template", {"messages": HI}), ("/responses", {"input": "hi"}))
    with running(write_tiny(tmp_path / "private place", **fields), names=("own",)) as served:
        for path, body in asked:
            status, reply = served.ask(path, body)
            assert (status, said in reply["error"]["message"]) == (400, True)
            assert "private place" not in str(reply)
