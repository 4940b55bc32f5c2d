"""A Chat whose template, tokenizer and model another process has. The conversation itself is here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pastkey.errors import InputError

from ..chat import Chat
from ..text.chat_template import read_template
from ..text.environment import MAX_SOURCE, plain
from .connection import Connection
from .protocol import MOST_JSON, Done, Found, Ids, Template, Text, Values
from .stream import numbers, sent_value

if TYPE_CHECKING:
    from .model import UntrustedModel

_MOST_RENDERED: Final = 32_000_000  # bytes of JSON for the 4,000,000 characters of a rendering
_PER_ID: Final = 16  # bytes of JSON
_PER_CHARACTER, _ALWAYS = 512, 64_000  # bytes of JSON of a text's ids: one character may be 36 bytes when normalized


class Tokenizer:
    """As TextCodec, in what a model, a Chat and an application call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See TextCodec."""
        return self._ids("encode", len(text), text=text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, keep_special_tokens: bool = False) -> str:
        """See TextCodec."""
        given = {"ids": sent_value("ids", ids), "keep_special_tokens": keep_special_tokens}
        most = MOST_JSON + _PER_ID * len(ids)
        return self._connection.call("for the text of ids", "decode", Text, **given, most_json=most).text

    def loses_space(self, token: int) -> bool:
        """See TextCodec."""
        return self._connection.call("about a token", "loses_space", Found, token=int(token)).found

    def _ids(self, what: str, length: int, **given: Any) -> list[int]:
        """Of a text of so many characters: no more of them than such a text can have."""
        most = min(_ALWAYS + _PER_CHARACTER * length, MOST_JSON + _PER_ID * length)
        return list(self._connection.call("for the ids of a text", what, Ids, **given, most_json=most).ids)


class PlainContents(Tokenizer):
    """As PlainContents of text/."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        connection.call("to prepare plain contents", "plain", Done)

    def protect(self, value: Any, but: Collection[str] = ()) -> Any:
        """See PlainContents of text/."""
        given = {"value": sent_value("a content", value), "but": list(but)}
        most = MOST_JSON + _MOST_RENDERED
        return self._connection.call("to protect a content", "protect", Values, **given, most_json=most).values["value"]

    def encode(self, rendered: str, *, add_special_tokens: bool = False) -> list[int]:
        """See PlainContents of text/."""
        del add_special_tokens
        return self._ids("plain_encode", len(rendered), rendered=rendered)


class ChatTemplate:
    """As ChatTemplate of text/, which compiles and renders it in the process."""

    def __init__(self, connection: Connection, source: str | None, tools: bool) -> None:
        """`source`: the text of a template in place of the bundle's own."""
        self._connection, self._number = connection, next(numbers)
        found = connection.call(
            "to compile the chat template", "template", Template, template=self._number, source=source, tools=tools
        )
        if len(found.source) > MAX_SOURCE:
            connection.fail("answered with a chat template that is too long, and was ended")
        self.source, self.variables = found.source, frozenset(found.variables)

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """See ChatTemplate of text/."""
        try:
            sent = {"messages": plain(list(messages)), "given": plain(given)}
        except (TypeError, RecursionError) as error:
            raise InputError(f"the chat template does not take this conversation: {error}") from None
        return self._connection.call(
            "to render a conversation", "render", Text, template=self._number, **sent, most_json=_MOST_RENDERED
        ).text

    def __del__(self) -> None:
        if "_number" in vars(self):
            self._connection.tell("forget", template=self._number)


class UntrustedChat(Chat):
    """As Chat."""

    model: UntrustedModel

    def _open_template(self, file: str | Path | None, *, tools: bool) -> Any:
        return ChatTemplate(self.model.alive(), None if file is None else read_template(file), tools)

    def _plain_contents(self, tokenizer: object) -> Any:
        del tokenizer
        return PlainContents(self.model.alive())
