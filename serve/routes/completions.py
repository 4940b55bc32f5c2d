"""POST /v1/completions: prompts -> continuations, whole or as events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pastkey.runtime import Chunk, Completion, LanguageModel, TextPrompt

from ..api.options import options_of
from ..api.replies import ChoiceWriter, finish_reason, text_logprobs
from ..api.schemas import CompletionBody, parsed
from ..errors import RequestError
from ..service import GenerationJob, Service

MAX_TOKENS = 16  # OpenAI's default


def prompts_of(given: str | list[Any]) -> list[Any]:
    """The prompts of a field that has a text, token ids, or a list of these."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def job_of(service: Service, body: CompletionBody, model: LanguageModel) -> GenerationJob:
    """The request to the model."""
    options = options_of(body, service, MAX_TOKENS)
    if body.logprobs is not None:
        options |= {"logprobs": body.logprobs, "prompt_logprobs": body.echo}
    texts = [(prompt, prompt if isinstance(prompt, str) else None) for prompt in prompts_of(body.prompt)]
    return GenerationJob([TextPrompt(model.prompt_ids(prompt), text) for prompt, text in texts], body.n, options)


async def completions(service: Service, request: Request, raw: bytes) -> Response:
    """Continues prompts."""
    body = parsed(CompletionBody, raw)
    if body.stream and body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs is for a reply that is not streamed", param="stream")
    name = service.require_model(body.model)
    running = await service.open(name, lambda model: job_of(service, body, model))
    return await running.answered(request, _CompletionWriter(service, body, running, "cmpl-"), stream=body.stream)


class _CompletionWriter(ChoiceWriter):
    kind = chunk_kind = "text_completion"

    def begin(self) -> Iterator[str]:
        self._lengths = Counter[int]()  # characters of each text so far
        for place in range(len(self.job.prompts) * self.body.n) if self.body.echo else ():
            yield self.event(place, {"text": self._prompt(place)[0]})

    def add(self, place: int, chunk: Chunk) -> Iterator[str]:
        if chunk.text or chunk.logprobs:
            logprobs = None
            if self.body.logprobs is not None:
                logprobs = text_logprobs(self.service, chunk.logprobs, chunk.ids, self._lengths[place])
                self._lengths[place] += sum(map(len, logprobs["tokens"]))
            yield self.event(place, {"text": chunk.text}, logprobs=logprobs)

    def last(self, place: int, completion: Completion) -> str:
        return self.event(place, {"text": ""}, finish_reason(completion))

    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        text, ids = self._prompt(place) if self.body.echo else ("", [])
        logprobs = [*completion.prompt_logprobs, *completion.logprobs]
        return {
            "index": place,
            "text": text + completion.text,
            "logprobs": None
            if self.body.logprobs is None
            else text_logprobs(self.service, logprobs, [*ids, *completion.ids]),
            "finish_reason": finish_reason(completion),
        }

    def _prompt(self, place: int) -> tuple[str, list[int]]:
        """The text and the ids of the prompt that a choice continues."""
        prompt: Any = self.job.prompts[place // self.body.n]
        codec = self.service.model.tokenizer
        text = prompt.text if prompt.text is not None else "" if codec is None else codec.decode(prompt.ids)
        return text, prompt.ids
