"""The interfaces that a conversation needs: the model and the chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol, Unpack

from pastkey.contract.bundle import Manifest

from ...decoding.stream import ChunkStream
from ...settings import GenerateOptions


class Format(Protocol):
    """Converts a conversation to token ids. ChatFormat implements it."""

    source: str
    variables: frozenset[str]

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """The conversation as a text."""

    def ids(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> list[int]:
        """The conversation as token ids."""

    def loses_space(self, token: int) -> bool:
        """Whether a text that begins with this token lacks the space that the token carries."""


class ChatModel(Protocol):
    """The interface of a conversation to its model. LanguageModel implements it."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, for the length of the context."""

    @property
    def executor(self) -> Executor:
        """The threads that wait for tokens on behalf of an event loop."""

    @property
    def renderers(self) -> dict[Any, Any]:
        """The compiled template of each kind of stateless call."""

    def chat_format(self, template: str | Path | None, *, tools: bool, special_tokens_as_text: bool) -> Format:
        """The conversion of conversations to token ids."""

    def stream(self, prompt: Sequence[int], **options: Unpack[GenerateOptions]) -> ChunkStream:
        """Continues token ids."""
