"""Divides an answer into content and tool calls while it is written: content at once, calls at its end."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from .tool_calls import MARKS, Call, Form, parse_tool_calls


@dataclass(frozen=True)
class ToolCallDelta:
    """A whole tool call at the end of an answer.

    Attributes:
        index: The number of the call in its answer, from 0.
        name: The function's name.
        arguments: The arguments' JSON text.
    """

    index: int
    name: str
    arguments: str


class ToolCallReader:
    """Tells the content of an answer piece by piece up to its first call, and the calls at the end.

    It holds back a possible beginning of a call's mark. `end` decides as `parse_tool_calls` does: if a call is
    malformed, the answer is text.

    Attributes:
        text: The whole answer so far.
    """

    def __init__(self, form: Form | None, known: Collection[str] = ()) -> None:
        """See `parse_tool_calls`."""
        self._form, self._known = form, known
        self._marks = MARKS.get(form or "", ())
        self.text = ""
        self._told = 0  # length of the text that was told as content
        self._calls = False  # whether calls may have begun

    def push(self, text: str) -> str:
        """The new content."""
        self.text += text
        start, self._told = self._told, max(self._told, 0 if self._calls else self._content())
        return self.text[start : self._told]

    def end(self) -> tuple[str, list[ToolCallDelta], str, list[Call]]:
        """The content that was held back and the calls; then the content and the calls of the whole answer."""
        said, calls = parse_tool_calls(self.text, self._form, self._known)
        told = [
            ToolCallDelta(number, call["name"], json.dumps(call["arguments"], ensure_ascii=False))
            for number, call in enumerate(calls)
        ]
        return said[self._told :], told, said, calls

    def _content(self) -> int:
        """The length of the text that is content, whatever follows."""
        places = [place for mark in self._marks if (place := self.text.find(mark)) >= 0]
        if places:
            self._calls = True
            return len(self.text[: min(places)].rstrip())
        if self._form == "llama3" and self.text.lstrip()[:1] in ("", "{"):  # a call without a mark is the whole text
            return 0
        held = [size for mark in self._marks for size in range(1, len(mark)) if self.text.endswith(mark[:size])]
        end = len(self.text) - max(held, default=0)
        return len(self.text[:end].rstrip()) if self._marks else end  # spaces before a call are no content
