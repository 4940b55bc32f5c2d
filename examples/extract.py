"""Structured extraction: a dataclass is the schema of what the model writes, and one of its instances is the answer.

pip install '.[cpu,export,huggingface,constrained]'
pastkey export HuggingFaceTB/SmolLM2-135M-Instruct --out bundle
python examples/extract.py bundle "Anna from Berlin wants twelve apples, by post."
"""

import dataclasses
import json
import sys
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pastkey

PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}


@dataclasses.dataclass
class Item:
    name: str
    count: int


@dataclasses.dataclass
class Order:
    customer: str
    city: str | None
    delivery: Literal["post", "courier", "unknown"]
    items: list[Item]


def schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of a dataclass, or of what its fields may be. Texts and lists have an end."""
    if dataclasses.is_dataclass(hint):
        properties = {name: schema_of(inner) for name, inner in get_type_hints(hint).items()}
        return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    if get_origin(hint) is list:
        return {"type": "array", "items": schema_of(get_args(hint)[0]), "maxItems": 5}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is types.UnionType:
        return {"anyOf": [schema_of(inner) for inner in get_args(hint)]}
    bound = {str: {"maxLength": 40}, int: {"minimum": 0, "maximum": 999}}.get(hint, {})
    return {"type": PLAIN[hint], **bound}


def made(hint: Any, value: Any) -> Any:
    """The instance that a JSON value describes."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint(**{name: made(inner, value[name]) for name, inner in get_type_hints(hint).items()})
    return [made(get_args(hint)[0], inner) for inner in value] if get_origin(hint) is list else value


if __name__ == "__main__":
    lm = pastkey.load(sys.argv[1])
    prompt = f"Here is an order: {sys.argv[2]}\nThe same as JSON: "
    answer = lm.generate(prompt, json_schema=schema_of(Order), max_new_tokens=400)
    print(made(Order, json.loads(answer.text)), f"({answer.forced_tokens} of {answer.new_tokens} tokens were certain)")
