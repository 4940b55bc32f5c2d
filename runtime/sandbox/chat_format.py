"""A chat format whose template and tokenizer another process has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from pastkey.errors import InputError
from pastkey.typed import TokenId

from ..text.environment import MAX_SOURCE, plain
from .connection import Connection, numbers
from .protocol import Format

T = TypeVar("T")
_MOST: Final = 64_000_000  # bytes of JSON for a rendering of 4,000,000 characters, or its ids


class SandboxedChatFormat:
    """As ChatFormat of text/.

    Attributes:
        source: The template's text.
        variables: The names that it reads.
    """

    def __init__(
        self, connection: Connection, source: str | None, *, tools: bool, special_tokens_as_text: bool
    ) -> None:
        """`source`: the text of a template in place of the bundle's own."""
        self._connection, self._number = connection, next(numbers)
        given = {"source": source, "tools": tools, "special_tokens_as_text": special_tokens_as_text}
        found = connection.call("to compile the chat template", "format", Format, {"number": self._number, **given})
        if len(found.source) > MAX_SOURCE:
            connection.fail("answered with a chat template that is too long, and was ended")
        self.source, self.variables = found.source, frozenset(found.variables)

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """See ChatFormat."""
        return self._rendered("render", str, messages, given)

    def ids(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> list[int]:
        """See ChatFormat."""
        return self._rendered("chat_ids", list[TokenId], messages, given)

    def _rendered(self, what: str, kind: type[T], messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> T:
        try:
            sent = {"number": self._number, "messages": plain(list(messages)), "variables": plain(given)}
        except (TypeError, RecursionError) as error:
            raise InputError(f"the chat template does not take this conversation: {error}") from None
        return self._connection.call("to render a conversation", what, kind, sent, most=_MOST)

    def loses_space(self, token: int) -> bool:
        """See TextCodec."""
        return self._connection.call(
            "about a token", "loses_space", bool, {"number": self._number, "token": int(token)}
        )

    def __del__(self) -> None:
        if "_number" in vars(self):
            self._connection.tell("drop", number=self._number)
