"""Encodes conversations as prompts, by a chat template and a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError

from .chat_template import ChatTemplate, Message
from .codec import TextCodec


class ChatFormat:
    """A chat template with a tokenizer.

    Attributes:
        source: The template's text.
        variables: The names that the template reads.
    """

    def __init__(self, template: ChatTemplate, codec: TextCodec, *, special_tokens_as_text: bool = False) -> None:
        """See `LanguageModel.chat`. Raises InputError for a tokenizer whose control tokens cannot be told from text."""
        self.source, self.variables = template.source, template.variables
        self._template, self._codec, self._plain = template, codec, None
        if special_tokens_as_text:
            from .plain_contents import PlainContents

            self._plain = PlainContents(codec)

    def render(self, messages: Sequence[Message], **given: Any) -> str:
        """See `ChatTemplate.render`. With `special_tokens_as_text`, protects contents, tools and documents."""
        if self._plain is None:
            return self._template.render(messages, **given)
        # With tools, answers keep their special tokens, which the model itself wrote.
        kept = ["role"] if given.get("tools") is None else ["role", "content"]
        shown: Any = [self._plain.protect(said, kept if said["role"] == "assistant" else ["role"]) for said in messages]
        marked: Mapping[str, Any] = {
            name: self._plain.protect(given[name], ["type"]) for name in ("tools", "documents") if name in given
        }
        return self._template.render(shown, **{**given, **marked})

    def ids(self, messages: Sequence[Message], **given: Any) -> list[int]:
        """The token ids of a rendering. Raises InputError as `render` and `TextCodec.encode` do."""
        text = self.render(messages, **given)
        return self._codec.encode(text, add_special_tokens=False) if self._plain is None else self._plain.encode(text)

    def loses_space(self, token: int) -> bool:
        """See TextCodec."""
        return self._codec.loses_space(token)


def open_chat_format(
    bundle: Bundle,
    codec: TextCodec | None,
    source: str | None = None,
    *,
    tools: bool = False,
    special_tokens_as_text: bool = False,
) -> ChatFormat:
    """The chat format of a bundle. See `ChatTemplate.from_bundle` for the arguments and further errors.

    Raises InputError if the bundle has no tokenizer.
    """
    if codec is None:
        raise InputError(
            f"{bundle.path} has no tokenizer and holds no conversation: use  pastkey run BUNDLE --prompt-ids 1,2,3  "
            "(on a server, /v1/completions)"
        )
    template = ChatTemplate.from_bundle(bundle, source, tools=tools)
    return ChatFormat(template, codec, special_tokens_as_text=special_tokens_as_text)
