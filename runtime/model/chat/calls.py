"""Stateless calls: messages in, a completion out. LanguageModel has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ...decoding.asynchronous import AsyncStream
from ...decoding.completion import Completion, completed
from ...options import lists_options, options_of
from ...text.chat_format import ChatFormat, open_chat_format
from ...text.chat_template import read_template
from ..opening import open_answer
from ..parts import ModelParts
from .chat_stream import ChatStream
from .prompt import (
    ANSWER_OPTIONS,
    CONVERSATION_OPTIONS,
    AnswerOptions,
    ChatPrompt,
    ConversationOptions,
    chat_prompt,
    chat_text,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

Messages = Sequence[Mapping[str, Any]]


@lists_options
class ChatCalls:
    """The calls of a model that answer messages. Each gets the whole conversation, and keeps only its KV cache."""

    parts: ModelParts

    @property
    def executor(self) -> Executor:
        """See LanguageModel."""
        raise NotImplementedError

    def generate_chat(self, messages: Messages, **options: Unpack[AnswerOptions]) -> Completion:
        """Answers a conversation.

        Args:
            messages: The conversation, in OpenAI's form. If the last message is an answer, the model continues it.
            **options: As in `Chat.ask`, and `ConversationOptions`: `tools`, `template`, `documents`,
                `special_tokens_as_text`, `template_variables`.

        Returns:
            The answer, with its `tool_calls`.

        Raises:
            InputError: The bundle has no tokenizer or chat template; the template rejects the conversation, or it is
                longer than the context; an option is out of range.
            OptionError: There is no option of that name.
            QueueFullError: `max_queue` requests wait already.
            NumericsError: The model yields NaN or infinity.
        """
        return completed(self._answer(messages, options_of("generate_chat", options, ANSWER_OPTIONS)))

    def stream_chat(self, messages: Messages, **options: Unpack[AnswerOptions]) -> ChatStream:
        """As `generate_chat`, token by token: each Chunk has new text, and one at the end the tool calls."""
        return self._answer(messages, options_of("stream_chat", options, ANSWER_OPTIONS))

    async def agenerate_chat(self, messages: Messages, **options: Unpack[AnswerOptions]) -> Completion:
        """As `generate_chat`, for `await`. Cancelling the task ends it within one step."""
        answer = self._answer(messages, options_of("agenerate_chat", options, ANSWER_OPTIONS))
        return await AsyncStream(answer, self.executor).completed()

    def astream_chat(self, messages: Messages, **options: Unpack[AnswerOptions]) -> AsyncStream:
        """As `stream_chat`, for `async for`. Cancelling the task ends it within one step."""
        answer = self._answer(messages, options_of("astream_chat", options, ANSWER_OPTIONS))
        return AsyncStream(answer, self.executor)

    def answer(self, prompt: ChatPrompt, options: Mapping[str, Any]) -> ChatStream:
        """The answer to a conversation. `options`: as returned by `options_of`."""
        return open_answer(self.parts, prompt, options)

    def chat_prompt(self, messages: Messages, **options: Unpack[ConversationOptions]) -> ChatPrompt:
        """The conversation as a prompt of `LanguageModel.stream_many` and `astream_many`. Raises as `generate_chat`."""
        return chat_prompt(self.parts, messages, options_of("chat_prompt", options, CONVERSATION_OPTIONS))

    def chat_text(self, messages: Messages, **options: Unpack[ConversationOptions]) -> str:
        """The conversation as the text that is encoded. Raises as `generate_chat`."""
        return chat_text(self.parts, messages, options_of("chat_text", options, CONVERSATION_OPTIONS))

    def chat_format(
        self, template: str | Path | None = None, *, tools: bool = False, special_tokens_as_text: bool = False
    ) -> ChatFormat:
        """The conversion of conversations to token ids. `chat` documents arguments and errors."""
        source = None if template is None else read_template(template)
        return open_chat_format(
            self.parts.bundle, self.parts.tokenizer, source, tools=tools, special_tokens_as_text=special_tokens_as_text
        )

    def _answer(self, messages: Messages, options: Mapping[str, Any]) -> ChatStream:
        given = {name: value for name, value in options.items() if name not in CONVERSATION_OPTIONS}
        return self.answer(chat_prompt(self.parts, messages, options), given)
