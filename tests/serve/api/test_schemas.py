"""Bodies as models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pastkey.serve.api.schemas import Body, ChatBody, CompletionBody, EmbeddingBody, parsed
from pastkey.serve.errors import RequestError


def test_a_null_is_an_absent_field_whatever_its_name():
    body = parsed(CompletionBody, b'{"prompt": "a", "seed": null, "suffix": null}')
    assert body.model_fields_set == {"prompt"}


@pytest.mark.parametrize("body", [b"", b"null", b"[1]", b'"a"', b"{", b'{"prompt": Infinity}', b"\xff"])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(RequestError, match=r"^the body is not "):
        parsed(CompletionBody, body)


HI = {"role": "user", "content": "hi"}


REFUSED: list[tuple[type[Body], dict[str, Any], str, str]] = [
    (CompletionBody, {"prompt": 3}, "prompt", "Input should be a valid string or a valid list"),
    (CompletionBody, {"prompt": []}, "prompt", "List should have at least 1 item after validation, not 0"),
    (CompletionBody, {"prompt": [-1]}, "prompt.0", "Input should be greater than or equal to 0"),
    (CompletionBody, {"prompt": ["a", 3]}, "prompt.1", "Input should be a valid string"),
    (CompletionBody, {"prompt": [[1], ["a"]]}, "prompt.1.0", "Input should be a valid integer"),
    (CompletionBody, {"prompt": "a", "stop": 3}, "stop", "Input should be a valid string or a valid list"),
    (CompletionBody, {"prompt": "a", "stop": ["a", 3]}, "stop.1", "Input should be a valid string"),
    (CompletionBody, {"prompt": "a", "n": "x", "stop": 3}, "n", "Input should be a valid integer"),
    (CompletionBody, {"stop": "a"}, "prompt", "Field required"),
    (ChatBody, {"messages": ["a"]}, "messages.0", "Input should be a valid dictionary"),
    (
        ChatBody,
        {"messages": [HI, {**HI, "content": ["a"]}]},
        "messages.1.content.0",
        "Input should be a valid dictionary",
    ),
    (ChatBody, {"messages": [HI], "tool_choice": "x"}, "tool_choice", "Input should be 'none', 'auto' or 'required'"),
    (ChatBody, {"messages": [HI], "tool_choice": {"type": "function"}}, "tool_choice.function", "Field required"),
    (EmbeddingBody, {"input": [[1], [-1]]}, "input.1.0", "Input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("kind", "body", "param", "said"), REFUSED)
def test_an_error_names_the_field_and_no_branch_of_its_type(kind, body, param, said):
    with pytest.raises(RequestError) as told:
        parsed(kind, json.dumps(body).encode())
    assert (told.value.param, str(told.value)) == (param, f"{param}: {said}")
