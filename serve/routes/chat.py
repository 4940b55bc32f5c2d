"""POST /v1/chat/completions: messages -> an answer, whole or as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pastkey.runtime import Chunk, Completion, LanguageModel

from ..api.options import options_of
from ..api.replies import ChoiceWriter, call_id, finish_reason, logprobs_of
from ..api.schemas import ChatBody, ConversationBody, ToolSpec, parsed
from ..errors import RequestError
from ..service import GenerationJob, Service


def conversation_of(body: ConversationBody) -> dict[str, Any]:
    """The arguments of the runtime's `chat_prompt`."""
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    for number, message in enumerate(messages):
        if message["role"] == "developer":
            message["role"] = "system"
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if part.get("type") != "text":
                raise RequestError(
                    f"this model reads text, and no part of the type {part.get('type')!r}",
                    param=f"messages.{number}.content",
                )
    choice = body.tool_choice
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()] if choice != "none" else []
    given: dict[str, Any] = {"messages": messages, "template_variables": body.chat_template_kwargs}
    if tools:
        given |= {"tools": tools, "tool_choice": choice.function.name if isinstance(choice, ToolSpec) else choice}
    elif choice == "required" or isinstance(choice, ToolSpec):
        raise RequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    return given


def job_of(service: Service, body: ChatBody, model: LanguageModel) -> GenerationJob:
    """The request to the model."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    prompt = model.chat_prompt(**conversation_of(body))
    options = options_of(body, service)
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    return GenerationJob([prompt], body.n, options)


async def chat(service: Service, request: Request, raw: bytes) -> Response:
    """Answers messages."""
    body = parsed(ChatBody, raw)
    name = service.require_model(body.model)
    running = await service.open(name, lambda model: job_of(service, body, model))
    return await running.answered(request, _ChatWriter(service, body, running, "chatcmpl-"), stream=body.stream)


class _ChatWriter(ChoiceWriter):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self) -> Iterator[str]:
        self._held: dict[int, list[Any]] = {}  # log-probabilities of tokens whose text is not complete
        for place in range(self.body.n):
            yield self.event(place, {"delta": {"role": "assistant", "content": None, "refusal": None}})

    def add(self, place: int, chunk: Chunk) -> Iterator[str]:
        held = self._held.setdefault(place, [])
        held += logprobs_of(self.service, chunk.logprobs) if self.body.logprobs else ()
        if chunk.text or chunk.tool_calls:
            logprobs = {"content": self._held.pop(place), "refusal": None} if self.body.logprobs else None
            yield self.event(place, {"delta": _delta(chunk)}, logprobs=logprobs)

    def last(self, place: int, completion: Completion) -> str:
        left = self._held.get(place)
        logprobs = {"content": left, "refusal": None} if left else None
        return self.event(place, {"delta": {}}, finish_reason(completion), logprobs)

    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        calls = [
            {
                "id": call_id(),
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for call in completion.tool_calls
        ]
        said = {"role": "assistant", "content": completion.text or (None if calls else ""), "refusal": None}
        logprobs = logprobs_of(self.service, completion.logprobs)
        return {
            "index": place,
            "message": {**said, "tool_calls": calls} if calls else said,
            "logprobs": {"content": logprobs, "refusal": None} if self.body.logprobs else None,
            "finish_reason": finish_reason(completion),
        }


def _delta(chunk: Chunk) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": chunk.text} if chunk.text else {}
    if chunk.tool_calls:
        delta["tool_calls"] = [
            {
                "index": part.index,
                "id": call_id(),
                "type": "function",
                "function": {"name": part.name, "arguments": part.arguments},
            }
            for part in chunk.tool_calls
        ]
    return delta
