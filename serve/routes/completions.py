"""POST /v1/completions: prompts -> continuations, whole or as events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pastkey.runtime import Chunk, Completion, LanguageModel

from ..api.options import options_of
from ..api.replies import TextChoice, TextLogprobs, TextReply, finish_reason, head, new_id, text_logprobs, usage_of
from ..api.schemas import CompletionBody, parsed
from ..errors import RequestError
from ..events import DONE, PING, ahead, event, guarded
from ..service import Job, Prompt, Running, Service

MAX_TOKENS = 16  # OpenAI's default


def prompts_of(given: str | list[Any]) -> list[Prompt]:
    """The prompts of a field that has a text, token ids, or a list of these."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return list(given)


def job_of(service: Service, body: CompletionBody) -> Job:
    """What the model is asked for."""
    options = options_of(body, service, MAX_TOKENS)
    if body.logprobs is not None:
        options |= {"logprobs": body.logprobs, "prompt_logprobs": body.echo}
    return Job(prompts_of(body.prompt), body.n, options)


async def completions(service: Service, request: Request, raw: bytes) -> Response:
    """Continues prompts."""
    body = parsed(CompletionBody, raw)
    if body.stream and body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs is for a reply that is not streamed", param="stream")
    name = service.require_model(body.model)
    running = await service.open(name, lambda model: job_of(service, body))
    identity = new_id("cmpl-")
    if body.stream:
        return running.streamed(guarded(_events(service, body, running, identity, name)))
    found = await running.completed(request)
    echoed = [_ids_of(service.model, prompt) if body.echo else [] for prompt in running.job.prompts]
    reply: TextReply = {
        "id": identity,
        "object": "text_completion",
        "created": running.created,
        "model": name,
        "system_fingerprint": service.fingerprint,
        "choices": [_choice(service, body, place, one, running.job, echoed) for place, one in enumerate(found)],
        "usage": usage_of(found, body.n),
    }
    return JSONResponse(reply)


def _ids_of(model: LanguageModel, prompt: Any) -> list[int]:
    return model.prompt_ids(prompt)


def _prompt_text(service: Service, prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    codec = service.model.tokenizer
    return "" if codec is None else codec.decode(prompt)


def _choice(
    service: Service, body: CompletionBody, place: int, found: Completion, job: Job, echoed: list[list[int]]
) -> TextChoice:
    number = place // body.n
    text, logprobs = found.text, None
    if body.logprobs is not None:
        tokens = [*echoed[number], *found.ids]
        logprobs = text_logprobs(service, [*found.prompt_logprobs, *found.logprobs], tokens)
    if body.echo:
        text = _prompt_text(service, job.prompts[number]) + text
    return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(found)}


async def _events(
    service: Service, body: CompletionBody, running: Running, identity: str, name: str
) -> AsyncGenerator[str, None]:
    usage = body.stream_options is not None and body.stream_options.include_usage
    common = head(service, "text_completion", identity, running.created, name)

    def told(place: int, text: str, reason: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event({**common, "choices": [choice], **({"usage": None} if usage else {})})

    if body.echo:
        for place in range(len(running.job.prompts) * body.n):
            yield told(place, _prompt_text(service, running.job.prompts[place // body.n]))
    async with contextlib.aclosing(ahead(running.chunks(), service.settings.ping_seconds)) as chunks:
        async for found in chunks:
            if found is None:
                yield PING
                continue
            place, chunk = found
            if chunk.text or chunk.logprobs:
                yield told(place, chunk.text, logprobs=_of_chunk(service, body, chunk))
    for place, completion in enumerate(running.completions):
        yield told(place, "", finish_reason(completion))
    if usage:
        yield event({**common, "choices": [], "usage": usage_of(running.completions, body.n)})
    yield DONE


def _of_chunk(service: Service, body: CompletionBody, chunk: Chunk) -> TextLogprobs | None:
    return None if body.logprobs is None else text_logprobs(service, chunk.logprobs, chunk.ids)
