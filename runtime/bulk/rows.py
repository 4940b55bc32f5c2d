"""Rows: JSON lines that ask for a prompt's continuation or a conversation's next answer, and the fields of an answer.

{"id": 7, "prompt": "Once upon", "max_new_tokens": 20}
{"id": "a", "messages": [{"role": "user", "content": "Hi"}]}
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeGuard, cast

from pastkey.errors import InputError, PastkeyError
from pastkey.files.reading import MOST_JSON, parse_json, require_regular
from pastkey.values import is_int, shown

from ..decoding.completion import Completion
from ..sampling.random_stream import MAX_SEED
from ..settings import CHAT_OPTIONS, ChatOptions
from ..text.messages import check_messages, read_message

RowId = str | int
Answer = dict[str, Any]  # of JSON's types

FIELDS = ("text", "finish_reason", "prompt_tokens", "new_tokens", "error")  # of an answer, in order
FURTHER = ("logprobs", "tool_calls")  # where they were asked for
OPTIONS = sorted(CHAT_OPTIONS - {"logits_processor", *FURTHER})  # options that a row may set
_NEAR = 0.8  # difflib's ratio from which on a field counts as a misspelt setting


@dataclass(frozen=True)
class Row:
    """A row to be answered.

    Attributes:
        number: Its line, from 1; of a batch its place.
        id: The source of its seed, and its name in a file.
        content: The row, or the sentence about its error.
    """

    number: int
    id: Any
    content: Mapping[str, Any] | str


@dataclass(frozen=True)
class RowRequest:
    """The request of one row.

    Attributes:
        prompt: A text or token ids; None where `messages` are given.
        messages: A conversation whose next answer is wanted.
        tools: JSON schemas of the functions that the model may call in that answer.
        options: The options that the row sets.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    options: ChatOptions = field(default_factory=lambda: ChatOptions())


# --- a file of rows -----------------------------------------------------------------------------------------------
def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines, in order. Empty lines are skipped. A row without an id is known as "line-5".

    Raises MissingFileError, or InputError if it is not a regular file.
    """
    require_regular(path)
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            content = _parsed(line, f"line {number} of {path}")
            found = content.get("id") if isinstance(content, dict) else None
            yield Row(number, found if is_id(found) else f"line-{number}", content)


def _parsed(line: bytes, where: str) -> dict[str, Any] | str:
    if len(line) > MOST_JSON:
        return f"{where} has more than {MOST_JSON:,} bytes, the limit of a row"
    try:
        content = parse_json(line, where)
    except PastkeyError as error:
        return str(error)
    return content if isinstance(content, dict) else f"{where} holds no object: a row was expected"


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines without a byte order mark. None needs much more memory than the longest line."""
    start = b"\xef\xbb\xbf"
    while line := file.readline(MOST_JSON + 2):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(1 << 20)):
            pass
        yield line.removeprefix(start)
        start = b""


def answered_line(row: Row, answer: Answer) -> bytes:
    """The line of the output: the id, the row's own fields, and those of its answer."""
    fields = row.content if isinstance(row.content, Mapping) else {}
    return json_text({"id": row.id, **fields, **answer} | {"id": row.id}).encode() + b"\n"


def json_text(value: Any) -> str:
    """JSON that every reader accepts: null for NaN and the infinities, which JSON lacks."""
    write = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
    try:
        return write(value, allow_nan=False)
    except ValueError:
        return write(json.loads(json.dumps(value), parse_constant=lambda _: None))


# --- the request of a row ------------------------------------------------------------------------------------------
def is_id(value: object) -> TypeGuard[RowId]:
    """Whether a row can be known by it."""
    return isinstance(value, str) or (is_int(value) and isinstance(value, int))


def seed_of(seed: int, identity: object) -> int:
    """The seed of a row, 0 to 2**63 - 1: of the job's seed and the row's id, so that no other row changes it.

    `identity` is a value of JSON. The seed is the first eight bytes, the highest bit left out, of the SHA-256 of
    [seed, id] as JSON without spaces, in UTF-8.
    """
    text = json.dumps([seed, identity], ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") & MAX_SEED


def parse_request(row: Mapping[str, Any]) -> RowRequest:
    """The request of a row. Raises InputError for an error in it; ranges are checked where it is begun."""
    if row.get("id") is not None and not is_id(row["id"]):
        raise InputError(f"id is {shown(row['id'])}; a text or a whole number was expected")
    for name in row:
        if name in FIELDS or name in FURTHER:
            raise InputError(f"the row has the field {name!r}, which the output has for the answer: rename it")
        if setting := _misspelt(name):
            raise InputError(f"the row has the field {shown(name)}; did you mean {setting!r}? Else rename the field")
    options = {name: row[name] for name in OPTIONS if row.get(name) is not None}
    if "logit_bias" in options:
        options["logit_bias"] = _logit_bias(options["logit_bias"])
    prompt, messages, tools = row.get("prompt"), row.get("messages"), row.get("tools")
    if (prompt is None) == (messages is None):
        raise InputError(f'the row has {"neither" if prompt is None else "both"} of "prompt" and "messages": give one')
    if messages is None:
        if tools:
            raise InputError("tools are for a conversation: give messages instead of the prompt")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(map(is_int, prompt))):
            raise InputError(f"the prompt is {shown(prompt)}; a text or a list of token ids was expected")
        return RowRequest(prompt, options=cast(ChatOptions, options))
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages is {shown(messages)}; a list of at least one message was expected")
    check_messages(messages)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"tools is {shown(tools)}; a list of JSON schemas was expected")
    return RowRequest(
        messages=list(map(read_message, messages)), tools=tools or None, options=cast(ChatOptions, options)
    )


@functools.lru_cache(1024)
def _misspelt(name: str) -> str | None:
    """The setting that a field's name is nearly."""
    near = [] if name in OPTIONS else difflib.get_close_matches(name.lower(), OPTIONS, 1, _NEAR)
    return near[0] if near else None


def _logit_bias(value: Any) -> dict[int, Any]:
    """JSON's keys are texts."""
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"logit_bias is {shown(value)}; an object of token ids and numbers was expected") from None


# --- its answer ---------------------------------------------------------------------------------------------------
def answer_of(completion: Completion, *, logprobs: bool = False, tools: bool = False) -> Answer:
    """The fields of a row that was answered."""
    found: Answer = {name: getattr(completion, name, None) for name in FIELDS}
    if logprobs:
        found["logprobs"] = [asdict(token) for token in completion.logprobs]
    if tools:
        found["tool_calls"] = completion.tool_calls
    return found


def error_of(sentence: str) -> Answer:
    """The fields of a row that could not be answered."""
    return dict.fromkeys(FIELDS) | {"error": sentence}
