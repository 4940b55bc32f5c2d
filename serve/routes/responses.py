"""POST /v1/responses, without storage: items become messages, and an answer of chat becomes items."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pastkey.runtime import Chunk, Completion, ToolCallDelta

from ..api.replies import call_id, finish_reason, logprobs_of, new_id
from ..api.schemas import ChatBody, FlatTool, ResponsesBody, checked, parsed
from ..errors import RequestError, body_of
from ..events import DONE, Writer, event
from ..service import Running, Service
from .chat import job_of

Item = dict[str, Any]
_TEXTS = ("input_text", "output_text", "text")
_TOOL = {"description": None, "parameters": None, "strict": None}
_SAME = ("temperature", "top_p", "top_logprobs", "presence_penalty", "frequency_penalty", "stream")


def chat_body_of(body: ResponsesBody) -> ChatBody:
    """The request of chat/completions that has the same answer."""
    if body.background:
        raise RequestError("background is true; this server stores nothing: leave it out", param="background")
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        _add(messages, item, f"input.{number}")
    given: dict[str, Any] = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    included = "message.output_text.logprobs" in (body.include or ())
    given |= {"messages": messages, "logprobs": body.top_logprobs is not None or included}
    if body.max_output_tokens is not None:
        given["max_tokens"] = body.max_output_tokens
    if body.tools:
        functions = [tool.model_dump(exclude_unset=True, exclude={"type"}) for tool in body.tools]
        given["tools"] = [{"type": "function", "function": function} for function in functions]
    if isinstance(body.tool_choice, FlatTool):
        given["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    elif body.tool_choice is not None:
        given["tool_choice"] = body.tool_choice
    form = None if body.text is None else body.text.format
    if form is not None:
        given["response_format"] = {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_ or {}}}
    return checked(ChatBody, given, {"messages": "input"})


def _add(messages: list[Item], item: Item, param: str) -> None:
    """Adds an item to the messages. Raises RequestError for one that a text model does not read."""
    kind = item.get("type", "message")
    try:
        if kind == "message":
            messages.append({"role": item["role"], "content": _text(item["content"], param)})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"], param)})
        elif kind != "reasoning":
            raise RequestError(f"items of the type {kind!r} are not supported", param=param)
    except KeyError as error:
        raise RequestError(f"an item of the type {kind!r} has no {error}", param=param) from None


def _text(content: Any, param: str) -> Any:
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS:
            raise RequestError("this model reads text parts only", param=param)
    return "".join(str(part.get("text", "")) for part in content)


async def responses(service: Service, request: Request, raw: bytes) -> Response:
    """Answers items."""
    body = parsed(ResponsesBody, raw)
    name = service.require_model(body.model)
    chat = chat_body_of(body)
    running = await service.open(name, lambda model: job_of(service, chat, model))
    return await running.answered(request, _ResponseWriter(service, body, chat, running), stream=body.stream)


class _ResponseWriter(Writer):
    """Makes the items of an answer, and the events of their parts."""

    def __init__(self, service: Service, body: ResponsesBody, chat: ChatBody, running: Running) -> None:
        self._service, self._logs = service, bool(chat.logprobs)
        self._number = -1
        self.output: list[Item] = []
        self._open: Item | None = None  # the last item, to which parts are added
        self._held: list[Any] = []  # log-probabilities of tokens whose text is not complete
        options = running.job.options
        dumped = body.model_dump(by_alias=True, exclude_unset=True)
        self._response: dict[str, Any] = {
            "id": new_id("resp_"), "object": "response", "created_at": running.created, "completed_at": None,
            "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "max_tool_calls": None,
            "model": running.name, "output": [], "parallel_tool_calls": True, "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key, "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier, "service_tier": "default", "store": False,
            "temperature": options.get("temperature", 0.0), "top_p": options.get("top_p", 1.0),
            "presence_penalty": options.get("presence_penalty", 0.0),
            "frequency_penalty": options.get("frequency_penalty", 0.0),
            "text": {"format": {"type": "text"}, **dumped.get("text", {})},
            "tool_choice": dumped.get("tool_choice", "auto"),
            "tools": [{**_TOOL, **tool} for tool in dumped.get("tools") or ()],
            "top_logprobs": body.top_logprobs or 0, "truncation": "disabled", "usage": None, "user": body.user,
            "metadata": body.metadata or {},
        }  # fmt: skip

    def event(self, kind: str, **content: Any) -> str:
        """An event, with its number."""
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **content}, kind)

    def status(self, kind: str) -> str:
        """An event of the response as it is now."""
        return self.event(kind, response={**self._response, "output": self.output})

    def begin(self) -> Iterator[str]:
        """The first events."""
        yield self.status("response.created")
        yield self.status("response.in_progress")

    def add(self, place: int, chunk: Chunk) -> Iterator[str]:
        """The events of a chunk."""
        del place  # there is one text
        if self._logs:
            self._held += logprobs_of(self._service, chunk.logprobs)
        if chunk.text:
            if self._open is None or self._open["type"] != "message":
                yield from self.close("completed")
                yield from self._begin({"type": "message", "role": "assistant", "content": []}, "msg_")
                self._item["content"].append(_part())
                yield self.event("response.content_part.added", **self._place, content_index=0, part=_part())
            yield self._delta(chunk.text)
        for call in chunk.tool_calls:
            yield from self.close("completed")
            item = {"type": "function_call", "call_id": call_id(), "name": call.name, "arguments": ""}
            yield from self._begin(item, "fc_")
            self._item["arguments"] = call.arguments
            yield self.event("response.function_call_arguments.delta", **self._place, delta=call.arguments)

    def close(self, status: str) -> Iterator[str]:
        """The last events of an item."""
        if self._open is None:
            return
        item, place = self._item, self._place
        if item["type"] == "message":
            if self._held:
                yield self._delta("")
            part = item["content"][0]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self.event("response.output_text.done", **place, content_index=0, **text)
            yield self.event("response.content_part.done", **place, content_index=0, part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self.event("response.function_call_arguments.done", **place, **done)
        item["status"] = status
        yield self.event("response.output_item.done", output_index=place["output_index"], item=item)
        self._open = None

    def end(self, completions: Sequence[Completion]) -> Iterator[str]:
        """The last events."""
        (completion,) = completions
        cut = finish_reason(completion) == "length"
        status = "incomplete" if cut else "completed"
        if not self.output:  # an empty answer
            yield from self._begin({"type": "message", "role": "assistant", "content": [_part()]}, "msg_")
        yield from self.close(status)
        self._response |= {
            "status": status,
            "completed_at": int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": completion.prompt_tokens,
                "input_tokens_details": {"cached_tokens": completion.cached_tokens},
                "output_tokens": completion.new_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": completion.prompt_tokens + completion.new_tokens,
            },
        }
        yield self.status(f"response.{status}")

    def fail(self, error: Exception) -> Iterator[str]:
        """The events of an error."""
        found = body_of(error)[1]["error"]
        self._response |= {
            "status": "failed",
            "error": {"code": found["code"] or "server_error", "message": found["message"]},
        }
        yield self.status("response.failed")
        yield DONE

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The response of an answer that is not streamed."""
        (completion,) = completions
        calls = [
            ToolCallDelta(place, call["name"], json.dumps(call["arguments"], ensure_ascii=False))
            for place, call in enumerate(completion.tool_calls)
        ]
        whole = Chunk(completion.text, completion.ids, completion.logprobs, calls)
        list(itertools.chain(self.add(0, whole), self.end(completions)))  # the items are made on the way
        return {**self._response, "output": self.output}

    def _delta(self, text: str) -> str:
        part, logprobs, self._held = self._item["content"][0], self._held, []
        part["text"] += text
        part["logprobs"] += logprobs
        return self.event("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=logprobs)

    @property
    def _item(self) -> Item:
        assert self._open is not None
        return self._open

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.output) - 1}

    def _begin(self, item: Item, prefix: str) -> Iterator[str]:
        self._open = {"id": new_id(prefix), "status": "in_progress", **item}
        self.output.append(self._open)
        yield self.event("response.output_item.added", output_index=len(self.output) - 1, item=self._open)


def _part() -> dict[str, Any]:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
