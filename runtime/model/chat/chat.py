"""A conversation: its messages so far, and the next answer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

from pastkey.errors import InputError, OptionError, TemplateWarning
from pastkey.values import or_default, shown

from ...decoding.asynchronous import AsyncStream
from ...decoding.completion import Completion, ToolCall, completed
from ...options import lists_options, options_of, require_valid
from ...settings import CHAT_OPTIONS, ChatOptions
from ...text.environment import plain
from ...text.messages import (
    Content,
    check_messages,
    checked_content,
    message,
    read_message,
    read_messages,
    save_messages,
    text_of,
)
from .calls import ChatCalls
from .chat_stream import ChatStream, Turn
from .prompt import ChatPrompt, ChatRenderer, beginning

if TYPE_CHECKING:
    from ...text.tools import Tool

_OURS = ("add_generation_prompt", "continue_final_message")  # the conversation sets these variables of the template


@lists_options
class Chat:
    """A conversation with a language model, rendered by a chat template.

    The template renders the whole conversation for each question. The KV cache holds most of it from the previous turn,
    so prefill computes little more than the question. Conversations on one model run concurrently; see LanguageModel. A
    conversation belongs to one thread at a time.

    Attributes:
        messages: The messages, {"role", "content"} each, and "tool_calls" if the model called tools.
        model: The model that answers.
        format: Converts the conversation to token ids.
        system: The system text, or None.
        tools: The JSON schemas of the tools, or None.
        documents: The documents, or None.
    """

    def __init__(
        self,
        model: ChatCalls,
        system: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        template: str | Path | None = None,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        special_tokens_as_text: bool | None = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """See `LanguageModel.chat`, whose further keywords are `template_variables`."""
        self.model = model
        as_text = or_default(special_tokens_as_text, False)
        require_valid({"system": system, "documents": documents, "special_tokens_as_text": as_text})
        check_messages(given := or_default(messages, ()))
        said = list(map(read_message, given))
        if said and said[0]["role"] == "system":
            if system is not None:
                raise InputError("system is given, and messages begin with another system text: leave one of them out")
            system = text_of(said.pop(0)["content"])
        self.system = system
        self.tools: list[dict[str, Any]] | None = None
        if tools is not None:
            from ...text.tools import tool_schemas  # only tools need its imports

            self.tools = tool_schemas(tools)
        self.documents = None if documents is None else [dict(document) for document in documents]
        self._variables = dict(template_variables or {})
        for name in _OURS:
            if name in self._variables:
                raise OptionError(f"chat() has no option {shown(name)}: a conversation sets it itself")
        self.format = model.chat_format(template, tools=bool(tools), special_tokens_as_text=as_text)
        self._renderer = ChatRenderer(self.format)
        self._notice_what_is_left_out(stacklevel=5)  # through LanguageModel.chat
        self.reset()
        if said:
            self._take_up([*self.messages, *said])

    def __repr__(self) -> str:
        return f"<Chat of {len(self.messages)} messages>"

    def reset(self) -> None:
        """Begins a new conversation with the same system text."""
        self.messages: list[dict[str, Any]] = [] if self.system is None else [message("system", self.system)]

    def ask(self, text: Content | None = None, **options: Unpack[ChatOptions]) -> Completion:
        """Answers a message.

        Args:
            text: The user's message: a text, or its parts {"type": "text", "text": ...}. None continues the
                conversation after tool results, or continues a truncated answer.
            **options: Those of `GenerateOptions`, except `reuse_prefix`, which an answer always does. `max_new_tokens`
                is 512. With tools, `keep_special_tokens` is True.

        Returns:
            The answer, which `messages` contains. It has `tool_calls` if the template's form is known (Hermes and Qwen,
            Llama 3, Mistral) and the whole text follows it.

        Raises:
            InputError: The conversation is longer than the context, or the template rejects it; an option is out of
                range; or another call changed the conversation meanwhile. This call leaves it unchanged.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity. The conversation is unchanged.
        """
        return completed(self._answer(text, options_of("chat.ask", options, CHAT_OPTIONS)))

    def stream(self, text: Content | None = None, **options: Unpack[ChatOptions]) -> ChatStream:
        """Answers a message token by token.

        This call raises errors of the message and the options. The first `next` starts the model. If the stream is
        closed early, the conversation has the answer so far. After an error, the conversation is unchanged.

        Args:
            text: As in `ask`.
            **options: As in `ask`.

        Returns:
            An iterator with a Chunk for each new token. Their joined texts are the completion's text. `completion` has
            the Completion at the end; it is also the value of StopIteration, or of `yield from`.

        Raises:
            InputError: As in `ask`.
            OptionError: There is no option of that name.
            NumericsError: The model yields NaN or infinity.
        """
        return self._answer(text, options_of("chat.stream", options, CHAT_OPTIONS))

    async def aask(self, text: Content | None = None, **options: Unpack[ChatOptions]) -> Completion:
        """As `ask`, for `await`. Cancelling the task ends the answer within one step and keeps it so far."""
        answer = self._answer(text, options_of("chat.aask", options, CHAT_OPTIONS))
        return await AsyncStream(answer, self.model.executor).completed()

    def astream(self, text: Content | None = None, **options: Unpack[ChatOptions]) -> AsyncStream:
        """As `stream`, for `async for`. Cancelling the task ends the answer within one step and keeps it so far."""
        answer = self._answer(text, options_of("chat.astream", options, CHAT_OPTIONS))
        return AsyncStream(answer, self.model.executor)

    def add_tool_result(self, content: Any, *, name: str | None = None, call_id: str | None = None) -> None:
        """Adds the result of a tool. `ask()` without a text then continues from it.

        Args:
            content: A text, or another JSON value, which is serialized.
            name: The tool. The result is for its first open call in the last answer. None means any tool.
            call_id: The "id" of the call in `messages`; it overrides the order of calls.

        Raises:
            InputError: No call waits for a result and no name is given, or JSON cannot encode the content.
        """
        require_valid({"name": name, "call_id": call_id})
        open_calls = [call for call in self._open_calls() if call_id in (None, call.get("id"))]
        call = next((call for call in open_calls if name in (None, call["function"]["name"])), None)
        if call is None and (name is None or call_id is not None):
            which = "that waits for a result" if call_id is None else shown(call_id)
            raise InputError(f"there is no tool call {which}: name the tool that returned this result (name=)")
        if not isinstance(content, str):
            try:
                content = json.dumps(plain(content), ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"the result of a tool cannot be written as JSON: {error}") from None
        ids = {"tool_call_id": call["id"]} if call is not None and call.get("id") else {}
        name = cast(dict[str, Any], call)["function"]["name"] if name is None else name
        self.messages = [*self.messages, message("tool", content, name=name, **ids)]

    def undo(self) -> None:
        """Removes the last question and everything after it. Raises InputError if there is none."""
        places = [place for place, said in enumerate(self._said()) if said["role"] == "user"]
        if not places:
            raise InputError("there is no question to undo")
        self.messages = self.messages[: places[-1]]

    def drop(self) -> None:
        """Removes the oldest question and its answer, but keeps the system text.

        The positions of the rest change, so it is prefilled again. Raises InputError if there is no question.
        """
        places = [place for place, said in enumerate(self._said()) if said["role"] == "user"]
        if not places:
            raise InputError("there is no question to drop")
        self.messages = self.messages[: places[0]] + self.messages[(places[1:] or [len(self.messages)])[0] :]

    def set_system(self, system: str | None) -> None:
        """Changes the system text, in this conversation and after `reset`.

        Raises InputError if the template rejects a system text. Then the old one stays.
        """
        require_valid({"system": system})
        said = self._said()
        before, self.system = self.system, system
        try:
            self._notice_what_is_left_out(stacklevel=4)
        except InputError:
            self.system = before
            raise
        rest = [one for place, one in enumerate(said) if place or one["role"] != "system"]
        self.messages = [*([] if self.system is None else [message("system", self.system)]), *rest]

    def save(self, path: str | Path) -> None:
        """Writes the conversation to a JSON file, {"messages": [...]}, atomically.

        Raises InputError if the file exists and holds something else, OSError if it cannot be written.
        """
        save_messages(path, self.messages)

    def load(self, path: str | Path) -> None:
        """Replaces this conversation by one that `save` wrote.

        Raises MissingFileError, IntegrityError or InputError if the file is not a conversation or the template rejects
        it. Then this one stays.
        """
        found = read_messages(path)
        self._take_up(found)
        first = found[0] if found else {}
        self.system = text_of(first["content"]) if first.get("role") == "system" else None

    def _take_up(self, found: list[dict[str, Any]]) -> None:
        """Replaces the messages. Raises InputError if the template rejects them."""
        asked = not found or found[-1]["role"] in ("assistant", "system")
        self._rendered([*found, message("user", "Hi")] if asked else found)
        self.messages = found

    # --- the answer -----------------------------------------------------------------------------------------------
    def _answer(self, text: Content | None, options: Mapping[str, Any]) -> ChatStream:
        """Checks the message and the options, and opens the stream."""
        if text is None:
            messages = self._standing()
        else:
            messages = [*self._said(), message("user", checked_content("the message", text))]
        prompt = self._prompt(messages)
        context = self.model.parts.manifest.context_length
        shifts = options.get("context_overflow") == "shift"
        if len(prompt.ids) > context and not shifts:
            raise InputError(
                f"with this message the conversation has {len(prompt.ids)} tokens; the context is {context}: remove "
                "the oldest question with /drop, the last one with /undo, or all with /reset (in Python, "
                "chat.drop(), undo(), reset()); nothing was lost"
            )
        if shifts and "num_sink_tokens" not in options:
            options = {**options, "num_sink_tokens": min(self._head_tokens(), context // 2)}
        answer = self.model.answer(prompt, options)
        answer.turn = _Turn(self, messages if beginning(messages) is None else messages[:-1], prompt.cut)
        return answer

    def _head_tokens(self) -> int:
        """The number of tokens before the first question: the system text and the template's additions."""
        first = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        one, other = (self._prompt([*first, message("user", text)]).ids for text in "ab")
        return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), len(one))  # noqa: B905

    def _said(self) -> list[dict[str, Any]]:
        """The messages. Users may change the list, so each is checked. Raises InputError for an invalid one."""
        check_messages(self.messages)
        return self.messages

    def _standing(self) -> list[dict[str, Any]]:
        """The messages, which end with a question, a result or an answer to continue."""
        messages = self._said()
        if beginning(messages) is None and (not messages or messages[-1]["role"] not in ("tool", "user")):
            raise InputError("the message is None; a text was expected, since there is nothing to continue")
        return messages

    def taken_in(self, messages: list[dict[str, Any]], text: str, calls: Sequence[ToolCall]) -> None:
        """Adds the whole answer to the conversation, with its tool calls."""
        more: dict[str, Any] = {}
        if calls:
            first = sum(len(said.get("tool_calls") or ()) for said in messages)
            # Mistral's templates require nine letters and digits.
            more["tool_calls"] = [
                {"id": f"call{first + place:05}", "type": "function", "function": call}
                for place, call in enumerate(calls)
            ]
        self.messages = [*messages, message("assistant", text, **more)]

    def _open_calls(self) -> list[dict[str, Any]]:
        """The tool calls of the last answer that have no result yet."""
        places = [place for place, said in enumerate(self._said()) if said["role"] == "assistant"]
        if not places:
            return []
        results = self.messages[places[-1] + 1 :]
        answered = {said.get("tool_call_id") or said.get("name") for said in results}
        if any(said["role"] == "user" for said in results):
            return []
        calls = self.messages[places[-1]].get("tool_calls") or ()
        return [call for call in calls if (call.get("id") or call["function"]["name"]) not in answered]

    # --- the template ---------------------------------------------------------------------------------------------
    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> ChatPrompt:
        return self._renderer.prompt(messages, **self._given())

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **changes: Any) -> str:
        return self._renderer.render(messages, **self._given(**changes))

    def _given(self, **changes: Any) -> dict[str, Any]:
        """The template's variables besides the messages."""
        return {"tools": self.tools, "documents": self.documents, **self._variables, **changes}

    def _notice_what_is_left_out(self, stacklevel: int) -> None:
        """Warns of arguments that the template ignores. Raises InputError if it rejects the system text.

        `stacklevel`: of the user's own line, for `_warn`.
        """

        def rendered(system: str | None, **changes: Any) -> str | InputError:
            first = [] if system is None else [message("system", system)]
            try:
                return self._rendered([*first, message("user", "Hi")], **changes)
            except InputError as error:
                return error

        whole = rendered(self.system)
        if self.system is not None:
            if isinstance(whole, InputError) and isinstance(rendered(None), str):
                raise InputError(
                    f"{whole}; it supports no system text: begin the first question with it, or give another template "
                    "with --template FILE (in Python, template=)"
                )
            if whole == rendered(self.system + " and more"):
                _warn("the chat template leaves the system text out: begin the first question with it", stacklevel)
        for name, given in (("tools", self.tools), ("documents", self.documents)):
            if given and whole == rendered(self.system, **{name: None}):
                _warn(f"the chat template leaves the {name} out, so the model does not see them", stacklevel)
        for name in self._variables:
            if name not in self.format.variables:
                _warn(f"the chat template does not read the variable {shown(name)}", stacklevel)


class _Turn(Turn):
    """The answer that a stream writes into a conversation, which no other call may change meanwhile."""

    def __init__(self, chat: Chat, messages: list[dict[str, Any]], cut: str) -> None:
        """`messages` are answered; `cut` is the beginning of the answer."""
        self._chat, self._messages, self._cut, self._said = chat, messages, cut, cut
        self._before = self._written = chat.messages  # another list means that another call has had the turn

    def take(self, text: str) -> None:
        self._require()
        self._said += text
        self._chat.messages = self._written = [*self._messages, message("assistant", self._said)]

    def end(self, completion: Completion) -> None:
        self._require()
        self._chat.taken_in(self._messages, self._cut + completion.text, completion.tool_calls)

    def fail(self) -> None:
        if self._chat.messages is self._written:
            self._chat.messages = self._before

    def _require(self) -> None:
        if self._chat.messages is not self._written:
            raise InputError(
                "the conversation has changed since this answer began: ask one question at a time, or make a chat for "
                "each"
            )


def _warn(sentence: str, stacklevel: int) -> None:
    warnings.warn(sentence, TemplateWarning, stacklevel=stacklevel)
