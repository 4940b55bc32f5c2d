"""A LangChain chat model over a bundle of pastkey.

    messages --convert_to_openai_messages--> lm.chat --> AIMessage

    ChatPastkey(bundle="bundle", temperature=0.7).invoke("Name three colours.")
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field

import pastkey


class ChatPastkey(BaseChatModel):
    """A bundle as a chat model. One loaded model serves all calls, threads and tasks, and decodes them together.

    Attributes:
        bundle: The folder of a bundle with a chat template, or a `pastkey.LanguageModel` that is loaded already.
        load_options: Keywords of `pastkey.load`, such as `threads`.
        options: The options of each call, such as `temperature`: those of `pastkey.runtime.ChatOptions`. Keywords of
            `invoke`, `stream` and `bind` override them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    bundle: str | Path | pastkey.LanguageModel
    load_options: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, bundle: str | Path | pastkey.LanguageModel, **given: Any) -> None:
        """Takes fields of this class, and options of a call."""
        own = {name: given.pop(name) for name in [*given] if name in type(self).model_fields}
        super().__init__(bundle=bundle, **{**own, "options": given | own.get("options", {})})

    @functools.cached_property
    def lm(self) -> pastkey.LanguageModel:
        """The model, loaded at the first use."""
        if isinstance(self.bundle, pastkey.LanguageModel):
            return self.bundle
        return pastkey.load(self.bundle, **self.load_options)

    @property
    def _llm_type(self) -> str:
        return "pastkey"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"bundle": str(self.bundle), **self.options}

    # --- answers -----------------------------------------------------------------------------------------------------
    def _open(self, call: str, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> Any:
        """The stream of an answer, by the method `call`, and its conversation."""
        options = self.options | ({"stop": stop} if stop else {}) | given
        tools = options.pop("tools", None)
        for name in ("stream", "ls_structured_output_format"):  # LangChain's own
            options.pop(name, None)
        chat = self.lm.chat(messages=convert_to_openai_messages(messages), tools=tools)
        return getattr(chat, call)(**options), chat

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> ChatResult:
        completion, chat = self._open("ask", messages, stop, given)
        return _result(completion, chat)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> ChatResult:
        answer, chat = self._open("astream", messages, stop, given)
        return _result(await answer.completed(), chat)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> Iterator[ChatGenerationChunk]:
        answer, chat = self._open("stream", messages, stop, given)
        with contextlib.closing(answer):
            for chunk in answer:
                if chunk.text and not chat.tools:  # the text of a call is no answer
                    yield _piece(AIMessageChunk(content=chunk.text))
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text)
        yield _last(answer.completion, chat)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        answer, chat = self._open("astream", messages, stop, given)
        async with answer:
            async for chunk in answer:
                if chunk.text and not chat.tools:
                    yield _piece(AIMessageChunk(content=chunk.text))
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text)
        yield _last(answer.completion, chat)
