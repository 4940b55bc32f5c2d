"""Reads tool calls while an answer is written: each piece of text becomes content, or a part of a call."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .tool_calls import MARKS, Call, Form, parse_tool_calls

# From the beginning of a call up to its arguments, an object.
_HEADS = (
    re.compile(r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'),
    re.compile(r"([^\s\[\]{}\"]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*(?=\{)"),  # Mistral's later one
)
_SPECIAL = re.compile(r'["{}\\]')


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of a tool call.

    Attributes:
        index: The number of the call in its answer, from 0.
        name: The function's name in the first part of a call, None in the others.
        arguments: The next piece of the arguments' JSON text. The pieces of a call together are the whole text.
    """

    index: int
    name: str | None
    arguments: str


class ToolCallReader:
    """Divides an answer into content and calls, piece by piece.

    It holds back what may be the beginning of a call's mark. A call whose name does not come first is told whole, at
    the end of the answer. `end` decides as `parse_tool_calls` does: if a call is malformed, the answer is text.

    Attributes:
        text: The whole answer so far.
    """

    def __init__(self, form: Form | None, known: Collection[str] = ()) -> None:
        """See `parse_tool_calls`."""
        self._form, self._known = form, known
        self._marks = MARKS.get(form or "", ())
        self.text = ""
        self._told = 0  # length of the text that was told as content
        self._place: int | None = None  # up to where the calls are read; None before the first
        self._marked = False
        self._calls = 0
        self._inside = False  # whether `_place` is inside of arguments
        self._depth, self._quoted = 0, False  # open braces there; whether a string is open

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The new content and the new parts of calls."""
        self.text += text
        content = "" if self._place is not None else self._read_content()
        parts: list[ToolCallDelta] = []
        for part in [] if self._place is None else self._read_calls():
            if parts and parts[-1].index == part.index:  # clients expect one part of a call at a time
                part = ToolCallDelta(part.index, parts[-1].name, parts.pop().arguments + part.arguments)
            parts.append(part)
        return content, parts

    def end(self) -> tuple[str, list[ToolCallDelta], str, list[Call]]:
        """What was held back: content and parts of calls; then the content and the calls of the whole answer."""
        said, calls = parse_tool_calls(self.text, self._form, self._known)
        late = [
            ToolCallDelta(number, call["name"], json.dumps(call["arguments"], ensure_ascii=False))
            for number, call in enumerate(calls)
            if number >= self._calls
        ]
        rest = "" if self._calls and not calls else said[self._told :]  # of a malformed call all was told
        return rest, late, said, calls

    def _read_content(self) -> str:
        """Tells content up to the first mark, behind which it begins to read calls."""
        places = [place for mark in self._marks if (place := self.text.find(mark)) >= 0]
        if places:
            self._place, self._marked = min(places), True
            end = len(self.text[: self._place].rstrip())
        elif self._form == "llama3" and self.text.lstrip()[:1] in ("", "{"):  # a call without a mark is the whole text
            self._place, end = 0 if self.text.strip() else None, 0
        else:
            held = [size for mark in self._marks for size in range(1, len(mark)) if self.text.endswith(mark[:size])]
            end = len(self.text) - max(held, default=0)
            end = len(self.text[:end].rstrip()) if self._marks else end  # spaces before a call are no content
        start, self._told = self._told, max(end, self._told)
        return self.text[start : self._told]

    def _read_calls(self) -> Iterator[ToolCallDelta]:
        """Tells the new parts of calls."""
        assert self._place is not None
        heads = _HEADS if self._form == "mistral" else _HEADS[:1]
        while True:
            if self._inside:
                start, self._place = self._place, self._read_arguments(self._place)
                if start < self._place:
                    yield ToolCallDelta(self._calls - 1, None, self.text[start : self._place])
                if self._inside:
                    return
            found = [head for pattern in heads if (head := pattern.search(self.text, self._place))]
            if not found:
                return
            head = min(found, key=lambda head: head.start())
            name = json.loads(f'"{head[1]}"', strict=False) if head.re is heads[0] else head[1]
            if not self._marked and name not in self._known:
                return
            yield ToolCallDelta(self._calls, name, "")
            self._calls += 1
            self._place, self._inside = head.end(), True

    def _read_arguments(self, place: int) -> int:
        """Reads on in an object. Returns the place behind it, or the end of the text."""
        while (found := _SPECIAL.search(self.text, place)) is not None:
            sign, place = found[0], found.end()
            if sign == "\\":
                if place == len(self.text):  # what it escapes is not here yet
                    return place - 1
                place += 1
            elif sign == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if sign == "{" else -1
                if not self._depth:
                    self._inside = False
                    return place
        return len(self.text)
