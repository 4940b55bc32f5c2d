"""What a row asks for: a prompt or a conversation with its settings, plain or as a request of OpenAI's batch files.

{"id": 7, "prompt": "Once upon", "max_new_tokens": 20}
{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}
{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 20}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, cast

from pastkey.errors import InputError
from pastkey.values import is_int, shown

from ..sampling.random_stream import MAX_SEED
from ..settings import CHAT_OPTIONS, ChatOptions
from ..text.messages import check_messages

RowId = str | int
Form = Literal["plain", "chat", "completions"]  # of the answer: the last two are OpenAI's

ID_FIELDS = ("id", "custom_id")
FIELDS = ("text", "finish_reason", "prompt_tokens", "new_tokens", "error")  # of a plain answer, in order
FURTHER = ("logprobs", "tool_calls")  # where they were asked for
OPTIONS = sorted(CHAT_OPTIONS - {"logits_processor"})  # what a row may set
_URLS: dict[str, Form] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
# Parameters of OpenAI's that change no text, and those that must have the one value that does not.
_WITHOUT_EFFECT = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier"})
_ONE_VALUE: dict[str, Any] = {"n": 1, "best_of": 1, "stream": False, "echo": False, "parallel_tool_calls": True}


@dataclass(frozen=True)
class Request:
    """What one row asks for.

    Attributes:
        prompt: A text or token ids; None where `messages` are given.
        messages: A conversation whose next answer is wanted.
        tools: JSON schemas of what the model may call in that answer.
        options: What the row sets.
        form: How it is answered.
        model: The name that an answer in OpenAI's form bears, where the row gives one.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    options: ChatOptions = field(default_factory=lambda: ChatOptions())
    form: Form = "plain"
    model: str | None = None


def row_id(row: Mapping[str, Any] | None, number: int, kind: str = "line") -> RowId:
    """The `id` or `custom_id` of a row, a text or a whole number; else "line-5" by its number, from 1."""
    for name in ID_FIELDS:
        if row is not None and is_id(row.get(name)):
            return cast(RowId, row[name])
    return f"{kind}-{number}"


def is_id(value: object) -> TypeGuard[RowId]:
    """Whether a row can be known by it."""
    return isinstance(value, str) or (is_int(value) and isinstance(value, int))


def seed_of(seed: int, identity: object) -> int:
    """The seed of a row, 0 to 2**63 - 1: of the job's seed and the row's id, so that no other row changes it.

    `identity` is what JSON has. The seed is the first eight bytes, the highest bit left out, of the SHA-256 of
    [seed, id] as JSON without spaces, in UTF-8.
    """
    text = json.dumps([seed, identity], ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") & MAX_SEED


def is_openai(row: Mapping[str, Any]) -> bool:
    """Whether a row is a request of OpenAI's batch files."""
    return "body" in row and ("url" in row or "custom_id" in row)


def form_of(row: Mapping[str, Any]) -> Form:
    """How a row is answered, also where it cannot be."""
    return _URLS.get(str(row.get("url")), "chat") if is_openai(row) else "plain"


def parse_request(row: Mapping[str, Any]) -> Request:
    """What a row asks for. Raises InputError with what is wrong with it; ranges are checked where it is begun."""
    for name in ID_FIELDS:
        if row.get(name) is not None and not is_id(row[name]):
            raise InputError(f"{name} is {shown(row[name])}; a text or a whole number was expected")
    if is_openai(row):
        return _openai_request(row)
    for name in (*FIELDS, *FURTHER):
        if name in row:
            raise InputError(f"the row has the field {name!r}, which the output has for the answer: rename it")
    options = {name: row[name] for name in OPTIONS if name not in FURTHER and row.get(name) is not None}
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is None and messages is None:
        raise InputError('the row has neither "prompt" nor "messages": give one of them')
    if prompt is not None and messages is not None:
        raise InputError('the row has "prompt" and "messages": give one of them')
    return _request(prompt, messages, row.get("tools"), options, "plain")


def _request(
    prompt: Any, messages: Any, tools: Any, options: dict[str, Any], form: Form, model: str | None = None
) -> Request:
    if "logit_bias" in options:
        options |= {"logit_bias": _logit_bias(options["logit_bias"])}
    if messages is None:
        if tools:
            raise InputError("tools are for a conversation: give messages in place of the prompt")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(map(is_int, prompt))):
            raise InputError(f"the prompt is {shown(prompt)}; a text or a list of token ids was expected")
        return Request(prompt, options=cast(ChatOptions, options), form=form, model=model)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages is {shown(messages)}; a list of at least one message was expected")
    check_messages(messages)
    # A table has every key in each message, null where the message has none.
    messages = [
        {name: part for name, part in said.items() if part is not None or name == "content"} for said in messages
    ]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"tools is {shown(tools)}; a list of JSON schemas was expected")
    messages = [_with_parsed_calls(said) for said in messages]
    return Request(messages=messages, tools=tools or None, options=cast(ChatOptions, options), form=form, model=model)


def _with_parsed_calls(said: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as objects, as templates take them; OpenAI's are JSON texts."""
    if not said.get("tool_calls"):
        return said
    calls = []
    for call in said["tool_calls"]:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise InputError(f"the tool call {call['id']:.60} has arguments that are no JSON") from None
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**said, "tool_calls": calls}


# --- OpenAI's -----------------------------------------------------------------------------------------------------
def _openai_request(row: Mapping[str, Any]) -> Request:
    url, body = row.get("url"), row.get("body")
    if url not in _URLS:
        raise InputError(f"url is {shown(url)}; {' or '.join(_URLS)} was expected")
    if row.get("method", "POST") != "POST":
        raise InputError(f"method is {shown(row['method'])}; POST was expected")
    if not isinstance(body, dict):
        raise InputError(f"body is {shown(body)}; an object was expected")
    form = _URLS[url]
    wanted = "messages" if form == "chat" else "prompt"
    given = {name: value for name, value in body.items() if value is not None}
    if wanted not in given:
        raise InputError(f'the body has no "{wanted}", which {url} needs')
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise InputError(f"model is {shown(model)}; a text was expected")
    tools = given.pop("tools", None) if form == "chat" else None
    if form == "chat" and (choice := given.pop("tool_choice", "auto")) != "auto":
        if choice != "none":
            raise InputError(f'tool_choice is {shown(choice)}; "auto" or "none" was expected')
        tools = None
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name != wanted:
            options |= _openai_option(name, value, given, form)
    return _request(given.get("prompt"), given.get("messages"), tools, options, form, model)


def _openai_option(name: str, value: Any, body: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """A parameter of a body as options. Raises InputError for one that is not known, or has a value that is not."""
    if name in _WITHOUT_EFFECT:
        return {}
    if name in _ONE_VALUE:
        if value != _ONE_VALUE[name]:
            raise InputError(
                f"{name} is {shown(value)}; {json.dumps(_ONE_VALUE[name])} is the one value that it may be"
            )
        return {}
    special = _SPECIAL.get(name) or (_CHAT_LOGPROBS.get(name) if form == "chat" else None)
    if special is not None:
        return special(value, body)
    name = _RENAMED.get(name, name)
    if name not in OPTIONS:
        raise InputError(f"the body has the parameter {name!r:.60}, which is not known here: leave it out")
    return {name: value}


def _response_format(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    inner = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise InputError(
            f'response_format is {shown(value)}; {{"type": "json_schema", "json_schema": {{"schema": ...}}}}, or the '
            'type "json_object" or "text" was expected'
        )
    return {"json_schema": inner["schema"]}


def _logit_bias(value: Any) -> dict[int, Any]:
    """JSON's keys are texts."""
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"logit_bias is {shown(value)}; an object of token ids and numbers was expected") from None


def _chat_logprobs(value: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise InputError(f"logprobs is {shown(value)}; true or false was expected, and the number in top_logprobs")
    return {"logprobs": body.get("top_logprobs", 0)} if value else {}


_Special = Callable[[Any, Mapping[str, Any]], dict[str, Any]]
_SPECIAL: dict[str, _Special] = {"response_format": _response_format}
_CHAT_LOGPROBS: dict[str, _Special] = {"logprobs": _chat_logprobs, "top_logprobs": lambda value, body: {}}
