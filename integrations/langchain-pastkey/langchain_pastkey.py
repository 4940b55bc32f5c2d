"""A LangChain chat model over a bundle of pastkey.

messages --convert_to_openai_messages--> lm.generate_chat --> AIMessage

ChatPastkey(bundle="bundle", temperature=0.7).invoke("Name three colours.")
"""

from __future__ import annotations

import contextlib
import functools
import uuid
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
from pastkey.runtime import Chunk


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
        """Accepts fields of this class, and options of a call."""
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

    # --- answers: LangChain calls these -------------------------------------------------------------------------------
    def _arguments(self, messages: list[BaseMessage], stop: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
        """The options of the model's calls."""
        options = self.options | ({"stop": stop} if stop else {}) | given
        for name in ("stream", "ls_structured_output_format"):  # LangChain's own
            options.pop(name, None)
        return {"messages": convert_to_openai_messages(messages), **options}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> ChatResult:
        return _result(self.lm.generate_chat(**self._arguments(messages, stop, given)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> ChatResult:
        return _result(await self.lm.agenerate_chat(**self._arguments(messages, stop, given)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with contextlib.closing(self.lm.stream_chat(**self._arguments(messages, stop, given))) as answer:
            yield from map(_piece, answer)
        yield _last(answer.completion)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **given: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with self.lm.astream_chat(**self._arguments(messages, stop, given)) as answer:
            async for chunk in answer:
                yield _piece(chunk)
        yield _last(answer.completion)

    # --- tools and schemas -------------------------------------------------------------------------------------------
    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **given: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Lets the model call tools, where its chat template has them.

        `tool_choice`: "auto", the default; "any" or "required", and the answer is a call; or the name of a tool, and
        the answer is a call of it.
        """
        if tool_choice is not None:
            given["tool_choice"] = "required" if tool_choice == "any" else tool_choice
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **given)

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **given: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Constrains the answer to a JSON schema, or to one of a Pydantic class, which the answer becomes.

        The model is not told of the schema: the prompt should ask for what it describes. `method` and `strict`, which
        other models accept, change nothing.
        """
        for name in ("method", "strict"):
            given.pop(name, None)
        model = isinstance(schema, type) and issubclass(schema, BaseModel)
        parser: Any = PydanticOutputParser(pydantic_object=schema) if model else JsonOutputParser()
        # A schema in the form of a tool is one as well.
        answer = self.bind(json_schema=schema if model else convert_to_json_schema(schema), **given)
        if not include_raw:
            return answer | parser
        parsed = RunnablePassthrough.assign(
            parsed=lambda found: parser.invoke(found["raw"]), parsing_error=lambda _: None
        ).with_fallbacks([RunnablePassthrough.assign(parsed=lambda _: None)], exception_key="parsing_error")
        return {"raw": answer} | parsed


# --- pastkey's results in LangChain's form ---------------------------------------------------------------------------
def _told(completion: pastkey.Completion) -> dict[str, Any]:
    """The fields of an AIMessage other than its content."""
    read, new = completion.prompt_tokens, completion.new_tokens
    details = {"cache_read": completion.cached_tokens}
    usage = UsageMetadata(input_tokens=read, output_tokens=new, total_tokens=read + new, input_token_details=details)
    return {"usage_metadata": usage, "response_metadata": {"finish_reason": completion.finish_reason}}


def _result(completion: pastkey.Completion) -> ChatResult:
    calls = [
        {"name": call["name"], "args": call["arguments"], "id": f"call_{uuid.uuid4().hex}", "type": "tool_call"}
        for call in completion.tool_calls
    ]
    message = AIMessage(content=completion.text, tool_calls=calls, **_told(completion))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _piece(chunk: Chunk) -> ChatGenerationChunk:
    parts = [
        tool_call_chunk(
            name=part.name,
            args=part.arguments,
            index=part.index,
            id=f"call_{uuid.uuid4().hex}" if part.name is not None else None,
        )
        for part in chunk.tool_calls
    ]
    return ChatGenerationChunk(message=AIMessageChunk(content=chunk.text, tool_call_chunks=parts))


def _last(completion: pastkey.Completion | None) -> ChatGenerationChunk:
    told = {} if completion is None else _told(completion)
    return ChatGenerationChunk(message=AIMessageChunk(content="", chunk_position="last", **told))
