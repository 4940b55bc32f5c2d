"""Bodies as models."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pastkey.serve.api.schemas import CompletionBody, TokenizeBody, parsed
from pastkey.serve.errors import RequestError


def test_a_null_is_an_absent_field_whatever_its_name() -> None:
    body = parsed(CompletionBody, b'{"prompt": "a", "seed": null, "suffix": null}')
    assert body.model_fields_set == {"prompt"}


@pytest.mark.parametrize("body", [b"", b"null", b"[1]", b'"a"', b"{", b'{"prompt": Infinity}', b"\xff"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match=r"^the body is not "):
        parsed(CompletionBody, body)


@pytest.mark.parametrize("field", ['"a": 1', '"with_pieces": "yes"', '"content": 1'])
def test_types_are_strict_and_unknown_fields_refused(field: str) -> None:
    with pytest.raises(ValidationError):
        parsed(TokenizeBody, f'{{"content": "x", {field}}}'.encode())
