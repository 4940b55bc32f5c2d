"""The formats of documents: {"text"}, {"prompt", "completion"} and {"messages"}, and which parts of each are trained.

A text is trained as a whole. Of a prompt with its completion the completion is trained, and of a conversation the
assistant's turns, each with the token that ends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pastkey.errors import InputError
from pastkey.files.reading import parse_json
from pastkey.values import is_unicode, shown

FIELDS: Final = ("text", "prompt", "completion", "messages", "tools")
Message = Mapping[str, Any]  # "role" and "content", and other fields that the chat template reads


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt, and the text that the model learns to write after it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages of which the model learns the assistant's, and the JSON schemas of tools."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Document:
    """One example, and its place for error messages: "chat.jsonl, line 3"."""

    place: str
    content: str | PromptAnswer | Conversation

    @property
    def masked(self) -> bool:
        """Whether parts of it are not trained."""
        return not isinstance(self.content, str)

    def canonical(self) -> bytes:
        """Returns the bytes that identify the content. Those of a text are its own."""
        return self.content.encode() if isinstance(self.content, str) else json.dumps(_json_of(self.content)).encode()

    def texts(self) -> Iterator[str]:
        """Yields its texts, to train a tokenizer on."""
        content = self.content
        if isinstance(content, Conversation):
            yield from (message["content"] for message in content.messages if isinstance(message.get("content"), str))
        else:
            yield content if isinstance(content, str) else content.prompt + content.completion


def _json_of(content: PromptAnswer | Conversation) -> Any:
    if isinstance(content, PromptAnswer):
        return [content.prompt, content.completion]
    return {"messages": content.messages, "tools": content.tools}


def parse_line(text: str, place: str) -> Any:
    """Returns the JSON value of a line. Raises InputError for the beginning of a JSON array over many lines."""
    if text == "[" or (text.startswith("[") and not text.endswith("]")):
        raise InputError(f"{place} begins a JSON array; one object a line was expected: convert it with  jq -c '.[]'")
    return parse_json(text, place)


def document_of(row: Any, place: str) -> Document:
    """Returns the document of a row. Raises InputError if the row has no known format."""
    if not isinstance(row, dict):
        raise InputError(f'{place} is {shown(row)}; expected an object such as {{"text": ...}}')
    given = {name: value for name, value in row.items() if value is not None}  # Parquet has every column in every row
    if "messages" in given:
        return Document(place, _conversation(given["messages"], given.get("tools"), place))
    if "prompt" in given and "completion" in given:
        prompt, completion = given["prompt"], given["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Document(place, PromptAnswer(_text(prompt, "prompt", place), _text(completion, "completion", place)))
        raise InputError(f"{place}: prompt and completion must be texts; a conversation goes into the field messages")
    if "text" in given:
        return Document(place, _text(given["text"], "text", place))
    found = ", ".join(map(str, given)) or "none"
    raise InputError(
        f"{place} has the fields {found[:200]}; expected text, or prompt and completion, or messages: rename them"
    )


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not is_unicode(value):
        raise InputError(f"{place}: {name} is {shown(value)}; it must be a text")
    return value


def _conversation(messages: Any, tools: Any, place: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: messages is {shown(messages)}; it must be a list of messages")
    for message in messages:
        whole = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not whole or not (isinstance(message.get("content"), str | list) or message.get("tool_calls")):
            raise InputError(f"{place}: a message is {shown(message)}; each must be an object with role and content")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{place}: tools is {shown(tools)}; it must be a list of JSON schemas")
    # Parquet gives every message every field.
    return Conversation([{k: v for k, v in message.items() if v is not None} for message in messages], tools)
