"""A conversation as the prompt of one stateless call, and the template that writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pastkey.errors import InputError
from pastkey.values import shown

from ...decoding.stream import ChunkStream
from ...settings import CHAT_NEW_TOKENS, ChatOptions
from ...text.chat_format import ChatFormat, open_chat_format
from ...text.chat_template import read_template
from ...text.messages import Content, check_messages, message, read_message, text_of
from ...text.tool_call_stream import ToolCallReader
from ...text.tool_calls import Form, call_grammar, tool_call_form, tool_names
from ..parts import ModelParts
from .chat_stream import ChatStream

if TYPE_CHECKING:
    from ...text.tools import Tool


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as token ids, for every call of a LanguageModel with a prompt.

    Attributes:
        ids: The token ids, which end where the answer begins.
        tools: The names of the tools, or None.
        form: The form of tool calls, or None if the template's is unknown.
        grammar: That the answer must follow, or None.
        cut: The beginning of the answer, where the last message is one to continue; else "".
        format: The format that encoded it.
    """

    ids: list[int]
    tools: tuple[str, ...] | None
    form: Form | None
    grammar: str | None
    cut: str
    format: ChatFormat

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the call that are not those of other prompts."""
        return {
            "max_new_tokens": CHAT_NEW_TOKENS,
            "keep_special_tokens": self.tools is not None,  # many models mark calls with them
            "reuse_prefix": True,
            **({} if self.grammar is None else {"grammar": self.grammar}),
        }

    def answered(self, stream: ChunkStream) -> ChatStream:
        """The answer that a model's stream writes."""
        reader = ToolCallReader(None if self.tools is None else self.form, self.tools or ())
        reader.push(self.cut)
        return ChatStream(stream, reader, self.format.loses_space)


class ChatRenderer:
    """Renders messages in the form that a template expects.

    Attributes:
        format: Converts the conversation to token ids.
        form: The form of tool calls in the template, or None.
    """

    def __init__(self, form: ChatFormat) -> None:
        """Finds by two renderings whether the template reads contents as texts, as parts, or both."""
        self.format, self.form = form, tool_call_form(form.source)
        parts = self._writes([{"type": "text", "text": "pastkey"}])
        self._takes_text, self._takes_parts = self._writes("pastkey") or not parts, parts

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """The conversation as a text."""
        return self.format.render(list(map(self._shaped, messages)), **given)

    def ids(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> list[int]:
        """The conversation as token ids."""
        return self.format.ids(list(map(self._shaped, messages)), **given)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None, **given: Any
    ) -> ChatPrompt:
        """The conversation as a prompt. If the last message is an answer, the model continues it."""
        cut = beginning(messages)
        ids = self.ids(messages, continue_final_message=cut is not None, tools=tools, **given)
        return ChatPrompt(ids, None if tools is None else tool_names(tools), self.form, None, cut or "", self.format)

    def _shaped(self, said: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message with its content in the form that the template supports: parts or text."""
        content = said.get("content")
        if content is None:  # with tool calls; templates concatenate texts
            said, content = {**said, "content": ""}, ""
        if isinstance(content, str) and not self._takes_text:
            return {**said, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list | tuple) and not self._takes_parts:
            return {**said, "content": text_of(content)}
        return said

    def _writes(self, content: Content) -> bool:
        try:
            text = self.format.render([message("user", content)])
        except InputError:
            return False
        return "pastkey" in text and "'pastkey'" not in text and '"pastkey"' not in text


class ConversationOptions(TypedDict, total=False):
    """The variables of the template in addition to the messages.

    - `tools`, `template`, `documents`, `special_tokens_as_text`: As in `LanguageModel.chat`.
    - `tool_choice` ("auto", "required" or a tool's name, "auto"): The last two make the answer one call, of any tool or
      of this one. This needs llguidance, and a template whose form of calls is known.
    - `template_variables` (mapping, none): Further variables of the template, such as {"enable_thinking": False}.
    """

    tools: Sequence[Tool] | None
    tool_choice: str | None
    template: str | Path | None
    documents: Sequence[Mapping[str, Any]] | None
    special_tokens_as_text: bool | None
    template_variables: Mapping[str, Any] | None


class AnswerOptions(ChatOptions, ConversationOptions, total=False):
    """The options of `generate_chat` and `stream_chat`: those of a Chat's answer, and of its conversation."""


CONVERSATION_OPTIONS: frozenset[str] = ConversationOptions.__optional_keys__
ANSWER_OPTIONS: frozenset[str] = AnswerOptions.__optional_keys__


def chat_prompt(parts: ModelParts, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> ChatPrompt:
    """The prompt of a conversation. Raises InputError if the bundle or its template does not support it."""
    renderer, said, given = _prepared(parts, messages, options)
    grammar = _grammar(parts, renderer, given["tools"] or [], options.get("tool_choice", "auto"))
    return dataclasses.replace(renderer.prompt(said, **given), grammar=grammar)


def chat_text(parts: ModelParts, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """The text of a conversation that is encoded. Raises as `chat_prompt`."""
    renderer, said, given = _prepared(parts, messages, options)
    return renderer.render(said, continue_final_message=beginning(said) is not None, **given)


def _prepared(
    parts: ModelParts, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> tuple[ChatRenderer, list[dict[str, Any]], dict[str, Any]]:
    """The renderer, the messages as templates read them, and the variables."""
    check_messages(messages)
    if not messages:
        raise InputError("messages is an empty list: give at least one message to answer")
    template, variables = options.get("template"), options.get("template_variables", {})
    given: dict[str, Any] = {**variables, "tools": None, "documents": options.get("documents")}
    if options.get("tools"):
        from ...text.tools import tool_schemas  # only tools need its imports

        given["tools"] = tool_schemas(options["tools"])
    tools, as_text = given["tools"] is not None, options.get("special_tokens_as_text", False)
    source = None if template is None else read_template(template)  # a file may change
    if (renderer := parts.renderers.get((source, tools, as_text))) is None:
        form = open_chat_format(parts.bundle, parts.tokenizer, source, tools=tools, special_tokens_as_text=as_text)
        renderer = parts.renderers[source, tools, as_text] = ChatRenderer(form)
    for name in [name for name in ("tools", "documents", *variables) if given[name] is not None]:
        if name not in renderer.format.variables:
            raise InputError(f"the chat template does not read {shown(name)}: leave it out, or give another template")
    return renderer, list(map(read_message, messages)), given


def _grammar(parts: ModelParts, renderer: ChatRenderer, tools: list[dict[str, Any]], choice: str) -> str | None:
    """The grammar of a call that is asked for."""
    if choice == "auto":
        return None
    chosen = [tool for tool, name in zip(tools, tool_names(tools), strict=True) if choice in ("required", name)]
    if not chosen:
        raise InputError(
            f'tool_choice is {shown(choice)}; "auto", "required" or the name of one of the tools is expected'
        )
    if renderer.form is None:
        raise InputError(
            "tool_choice asks for a call, and the form of this chat template's calls is not known: docs/chat.md lists "
            "the forms"
        )
    added = {} if parts.tokenizer is None else parts.tokenizer.added_tokens
    special = {text: token for text, (token, is_special) in added.items() if is_special}
    return call_grammar(renderer.form, chosen, special.get)


def beginning(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of an answer that the last message begins, or None."""
    last = messages[-1] if messages else {"role": "system"}
    return text_of(last["content"]) if last["role"] == "assistant" and not last.get("tool_calls") else None
