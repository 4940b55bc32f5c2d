"""Constraints as the user states them, checked without llguidance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pastkey.errors import InputError
from pastkey.values import shown

# Beyond these, compiling needs seconds, or more stack than `Vocabulary` gives it.
MAX_SCHEMA_CHARACTERS = 500_000
MAX_SUBSCHEMAS = 2_000
MAX_CHARACTERS = 50_000  # of a regular expression or a grammar
MAX_CHOICES = 10_000

Kind = Literal["json_schema", "regex", "choices", "grammar"]
KINDS: tuple[Kind, ...] = ("json_schema", "regex", "choices", "grammar")


@dataclass(frozen=True)
class Constraint:
    """One constraint on the output.

    Attributes:
        kind: The option's name.
        text: The schema as JSON, the expression, the choices as a JSON list, or the grammar.
    """

    kind: Kind
    text: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Constraint | None:
        """The constraint of a call's options, or None.

        `options` are those of `options_of`. Raises InputError for several constraints, for a malformed one, and for one
        beyond the limits of this module.
        """
        given = [kind for kind in KINDS if options.get(kind) is not None]
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} were both given: a text can follow one of {', '.join(KINDS)}")
        if not given:
            return None
        kind = given[0]
        try:
            return cls(kind, _text_of(kind, options[kind]))
        except InputError as error:
            error.option = kind
            raise


def _text_of(kind: Kind, value: Any) -> str:
    if kind == "json_schema":
        text = _schema_text(value)
    elif kind == "choices":
        text = _choices_text(list(value))
    else:
        text = _bounded(kind, value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{kind} holds half of a surrogate pair, which is not a character: remove it") from None
    return text


def _schema_text(value: object) -> str:
    expected = "a JSON schema was expected, as a dict, as its JSON text or as the class of a Pydantic model"
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"json_schema is not JSON ({error}); {expected}") from None
    if schema is False:
        raise InputError("json_schema is false, which no text validates: describe one, or leave it out")
    schema = {} if schema is True else schema  # any JSON is valid
    if not isinstance(schema, Mapping):
        raise InputError(f"json_schema is {shown(schema)}; {expected}")
    try:
        text = json.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"json_schema holds a value that JSON cannot write ({error}); {expected}") from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise InputError(_too_long("json_schema", len(text), MAX_SCHEMA_CHARACTERS))
    schema = json.loads(text)
    found = sum(1 for _ in _subschemas(schema))
    if found > MAX_SUBSCHEMAS:
        raise InputError(f"json_schema has {found} objects; at most {MAX_SUBSCHEMAS} are allowed: ask for less at once")
    return text


def _choices_text(texts: list[str]) -> str:
    length = sum(map(len, texts))
    if len(texts) > MAX_CHOICES or length > MAX_SCHEMA_CHARACTERS:
        raise InputError(
            f"choices holds {len(texts)} texts of {length} characters; at most {MAX_CHOICES} texts of "
            f"{MAX_SCHEMA_CHARACTERS} characters together are allowed: choose in two steps"
        )
    return json.dumps(texts, ensure_ascii=False)


def _bounded(kind: Kind, value: str) -> str:
    if len(value) > MAX_CHARACTERS:
        raise InputError(_too_long(kind, len(value), MAX_CHARACTERS))
    return value


def _too_long(kind: str, found: int, most: int) -> str:
    return f"{kind} has {found} characters; at most {most} are allowed: ask for less at once"


def _subschemas(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in a schema, including itself."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
