"""What a conversation asks of its model, and of the form of its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol, Unpack

from pastkey.contract.bundle import Manifest

from ...decoding.stream import ChunkStream
from ...settings import GenerateOptions


class Format(Protocol):
    """How a conversation becomes token ids: see ChatFormat, which has what is here."""

    source: str
    variables: frozenset[str]

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """The conversation as a text."""

    def ids(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> list[int]:
        """The conversation as token ids."""

    def loses_space(self, token: int) -> bool:
        """Whether a text that begins with this token lacks the space that the token carries."""


class ChatModel(Protocol):
    """What a conversation asks of its model: LanguageModel has it, and the model in a sandbox."""

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest, for the length of the context."""

    @property
    def executor(self) -> Executor:
        """The threads that wait for the tokens of an event loop."""

    def chat_format(self, template: str | Path | None, *, tools: bool, special_tokens_as_text: bool) -> Format:
        """How a conversation becomes token ids."""

    def stream(self, prompt: Sequence[int], **options: Unpack[GenerateOptions]) -> ChunkStream:
        """Continues token ids."""
