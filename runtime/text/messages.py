"""Messages of a conversation, and the files that store them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pastkey.errors import InputError, PastkeyError
from pastkey.files.durable import write_json
from pastkey.files.folder import read_json
from pastkey.values import as_path, require_type, shown

Content = str | Sequence[Mapping[str, Any]]  # a text, or parts {"type": "text", "text": ...}


def message(role: str, content: Content, **more: Any) -> dict[str, Any]:
    """A message, with copies of its parts."""
    return {"role": role, "content": content if isinstance(content, str) else [dict(part) for part in content], **more}


def checked_content(name: str, content: Any) -> Content:
    """`content`, a text or a list of text parts. Raises InputError for anything else."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) and content else None
    if parts is None or not all(isinstance(part, Mapping) for part in parts):
        raise InputError(
            f'{name} is {shown(content)}; a text was expected, or a list of parts {{"type": "text", "text": ...}}'
        )
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f'{name} has the part {shown(part)}; this model reads text: {{"type": "text", "text": ...}} was '
                "expected"
            )
    return parts


def text_of(content: Content) -> str:
    """The content as one text, with its parts on separate lines."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def save_messages(path: str | Path, messages: Sequence[Mapping[str, Any]]) -> None:
    """Writes {"messages": [...]} as JSON, atomically.

    Raises InputError if the file exists and holds something else, OSError if it cannot be written.
    """
    file = as_path(path)
    if file.is_dir():
        raise InputError(f"{file} is a folder; the name of a file to save the conversation in was expected")
    if file.exists() and not _is_replaceable(file):
        raise InputError(f"{file} exists and is not a saved conversation: choose another name")
    try:
        write_json(file, {"messages": list(messages)})
    except (TypeError, ValueError, RecursionError) as error:  # a value outside JSON
        raise InputError(f"the conversation cannot be saved in {file}: {error}") from None


def _is_replaceable(file: Path) -> bool:
    """Whether a file is empty or a saved conversation."""
    try:
        return file.stat().st_size == 0 or isinstance(read_json(file).get("messages"), list)
    except PastkeyError:
        return False


def read_messages(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file of `save_messages`.

    Raises MissingFileError, IntegrityError for invalid JSON, InputError for anything but a conversation.
    """
    file = as_path(path)
    if file.is_dir():
        raise InputError(f"{file} is a folder; a saved conversation was expected")
    found = read_json(file).get("messages")
    if not isinstance(found, list):
        raise InputError(f'{file} is not a saved conversation: it has no list of "messages"')
    check_messages(found, f" of {file}")
    return found


def check_messages(found: Sequence[Any], where: str = "") -> None:
    """Raises InputError for the first entry that is not a message. The error has `where` after its number."""
    require_type(isinstance(found, Iterable), "messages", found, 'a list of {"role": ..., "content": ...}')
    for number, entry in enumerate(found, 1):
        name = f"message {number}{where}"
        if not isinstance(entry, dict) or not isinstance(entry.get("role"), str) or not entry["role"]:
            raise InputError(f'{name} is {shown(entry)}; an object with "role" and "content" was expected')
        calls = entry.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_tool_call, calls)):
            raise InputError(
                f'{name} has the tool calls {shown(calls)}; a list of objects was expected, each with a "function" '
                'with a "name", and a text for its "id"'
            )
        if entry.get("content") is not None or not (calls and entry["role"] == "assistant"):
            checked_content(name, entry.get("content"))


def _is_tool_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return named and isinstance(call.get("id"), str | None)


def read_message(said: Mapping[str, Any]) -> dict[str, Any]:
    """A message of another program in the form that templates read. Raises InputError for arguments of invalid JSON.

    Drops nulls, which tables have for the keys of other messages. Parses arguments of tool calls: OpenAI's are JSON
    texts, templates read objects.
    """
    found = {name: part for name, part in said.items() if part is not None or name == "content"}
    if not found.get("tool_calls"):
        return found
    calls = []
    for call in found["tool_calls"]:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                name = call.get("id") or call["function"]["name"]
                raise InputError(f"the tool call {name:.60} has arguments that are not JSON") from None
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**found, "tool_calls": calls}
