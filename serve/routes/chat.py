"""POST /v1/chat/completions: messages -> an answer, whole or as events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pastkey.runtime import Chunk, Completion, LanguageModel

from ..api.options import options_of
from ..api.replies import ChatChoice, ChatReply, call_id, finish_reason, head, logprobs_of, new_id, usage_of
from ..api.schemas import ChatBody, ConversationBody, NamedTool, parsed
from ..errors import RequestError
from ..events import DONE, PING, ahead, event, guarded
from ..service import Job, Running, Service


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
        given |= {"tools": tools, "tool_choice": choice.function.name if isinstance(choice, NamedTool) else choice}
    elif choice == "required" or isinstance(choice, NamedTool):
        raise RequestError("tool_choice asks for a call, and there are no tools", param="tool_choice")
    return given


def job_of(service: Service, body: ChatBody, model: LanguageModel) -> Job:
    """What the model is asked for."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    prompt = model.chat_prompt(**conversation_of(body))
    options = options_of(body, service)
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    return Job([prompt], body.n, options)


async def chat(service: Service, request: Request, raw: bytes) -> Response:
    """Answers messages."""
    body = parsed(ChatBody, raw)
    name = service.require_model(body.model)
    running = await service.open(name, lambda model: job_of(service, body, model))
    identity = new_id("chatcmpl-")
    if body.stream:
        return running.streamed(guarded(_events(service, body, running, identity, name)))
    completions = await running.completed(request)
    reply: ChatReply = {
        "id": identity,
        "object": "chat.completion",
        "created": running.created,
        "model": name,
        "system_fingerprint": service.fingerprint,
        "choices": [_choice(service, body, place, completion) for place, completion in enumerate(completions)],
        "usage": usage_of(completions, body.n),
    }
    return JSONResponse(reply)


def _choice(service: Service, body: ChatBody, place: int, completion: Completion) -> ChatChoice:
    calls = completion.tool_calls
    choice: ChatChoice = {
        "index": place,
        "message": {"role": "assistant", "content": completion.text or (None if calls else ""), "refusal": None},
        "logprobs": {"content": logprobs_of(service, completion.logprobs), "refusal": None} if body.logprobs else None,
        "finish_reason": finish_reason(completion),
    }
    if calls:
        choice["message"]["tool_calls"] = [
            {
                "id": call_id(),
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            }
            for call in calls
        ]
    return choice


async def _events(
    service: Service, body: ChatBody, running: Running, identity: str, name: str
) -> AsyncGenerator[str, None]:
    usage = body.stream_options is not None and body.stream_options.include_usage
    common = head(service, "chat.completion.chunk", identity, running.created, name)

    def told(place: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**common, "choices": [choice], **({"usage": None} if usage else {})})

    for place in range(body.n):
        yield told(place, {"role": "assistant", "content": None, "refusal": None})
    held: dict[int, list[Any]] = {}  # log-probabilities of tokens whose text is not complete
    async with contextlib.aclosing(ahead(running.chunks(), service.settings.ping_seconds)) as chunks:
        async for found in chunks:
            if found is None:
                yield PING
                continue
            place, chunk = found
            held.setdefault(place, []).extend(logprobs_of(service, chunk.logprobs) if body.logprobs else ())
            if chunk.text or chunk.tool_calls:
                logprobs = {"content": held.pop(place), "refusal": None} if body.logprobs else None
                yield told(place, _delta(chunk), logprobs=logprobs)
    for place, completion in enumerate(running.completions):
        left = held.get(place)
        yield told(place, {}, finish_reason(completion), {"content": left, "refusal": None} if left else None)
    if usage:
        yield event({**common, "choices": [], "usage": usage_of(running.completions, body.n)})
    yield DONE


def _delta(chunk: Chunk) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": chunk.text} if chunk.text else {}
    if chunk.tool_calls:
        delta["tool_calls"] = [
            {
                "index": part.index,
                **({} if part.name is None else {"id": call_id(), "type": "function"}),
                "function": {**({} if part.name is None else {"name": part.name}), "arguments": part.arguments},
            }
            for part in chunk.tool_calls
        ]
    return delta
