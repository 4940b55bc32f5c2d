"""How a row is answered: fields beside its own, or the response of OpenAI's batch files. JSON's types only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..completion import Completion
from ..sampling.log_probs import TokenLogprob
from ..text.codec import TextCodec
from .requests import FIELDS, RowId

Answer = dict[str, Any]

_REASONS = {"stop_string": "stop", "deadline": "length", "cancelled": "length"}  # as OpenAI has them


def plain_answer(answer: Completion, *, logprobs: bool = False, tools: bool = False) -> Answer:
    """The fields of a row that was answered."""
    found: Answer = {name: getattr(answer, name, None) for name in FIELDS}
    if logprobs:
        found["logprobs"] = [asdict(token) for token in answer.logprobs]
    if tools:
        found["tool_calls"] = answer.tool_calls
    return found


def plain_error(sentence: str) -> Answer:
    """The fields of a row that was not."""
    return dict.fromkeys(FIELDS) | {"error": sentence}


def openai_answer(
    identity: RowId,
    answer: Completion,
    said: Mapping[str, Any] | None,
    *,
    model: str,
    created: int,
    logprobs: bool,
    codec: TextCodec | None,
) -> Answer:
    """A row's `response` and `error`.

    Args:
        identity: The row's id.
        answer: What was generated.
        said: The message of a conversation that it became.
        model: The name to tell.
        created: The time to tell, in seconds since 1970.
        logprobs: Whether log-probabilities were asked for.
        codec: What tokens are shown by.
    """
    calls = [] if said is None else said.get("tool_calls") or []
    choice: dict[str, Any] = {"index": 0}
    if said is None:
        choice |= {"text": answer.text, "logprobs": _completion_logprobs(answer.logprobs, codec) if logprobs else None}
    else:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": said["content"] if said["content"] or not calls else None,
        }
        if calls:
            message["tool_calls"] = [_written_call(call) for call in calls]
        choice |= {
            "message": message,
            "logprobs": {"content": _chat_logprobs(answer.logprobs, codec)} if logprobs else None,
        }
    choice["finish_reason"] = "tool_calls" if calls else _REASONS.get(answer.finish_reason, answer.finish_reason)
    body = {
        "id": f"{'cmpl' if said is None else 'chatcmpl'}-{_digest(identity)}",
        "object": "text_completion" if said is None else "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.new_tokens,
            "total_tokens": answer.prompt_tokens + answer.new_tokens,
        },
    }
    return {"response": _response(identity, 200, body), "error": None}


def openai_error(identity: RowId, sentence: str) -> Answer:
    """The `response` and `error` of a row that was not answered."""
    error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}
    return {
        "response": _response(identity, 400, {"error": error}),
        "error": {"code": "invalid_request_error", "message": sentence},
    }


def openai_row(identity: RowId, answer: Answer) -> Answer:
    """The whole row of the output."""
    return {"id": f"batch_req_{_digest(identity)}", "custom_id": identity, **answer}


def json_text(value: Any, separators: tuple[str, str] | None = None) -> str:
    """JSON that every reader takes: null for NaN and the infinities, which Python has and JSON has not."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
    except ValueError:
        value = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(value, ensure_ascii=False, separators=separators)


def _response(identity: RowId, status: int, body: Answer) -> Answer:
    return {"status_code": status, "request_id": f"req_{_digest(identity)}", "body": body}


def _digest(identity: RowId) -> str:
    """A name that is the same each time."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _written_call(call: Mapping[str, Any]) -> Answer:
    """A tool call with its arguments as a JSON text."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": json_text(function["arguments"])}}


def _shown(token: int, codec: TextCodec | None) -> str:
    return str(token) if codec is None else codec.decode([token], keep_special_tokens=True)


def _chat_logprobs(found: Sequence[TokenLogprob], codec: TextCodec | None) -> list[Answer]:
    def one(token: int, logprob: float) -> Answer:
        text = _shown(token, codec)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        {**one(token.id, token.logprob), "top_logprobs": [one(other, logprob) for other, logprob in token.top]}
        for token in found
    ]


def _completion_logprobs(found: Sequence[TokenLogprob], codec: TextCodec | None) -> Answer:
    return {
        "tokens": [_shown(token.id, codec) for token in found],
        "token_logprobs": [token.logprob for token in found],
        "top_logprobs": [{_shown(other, codec): logprob for other, logprob in token.top} for token in found],
        "text_offset": None,
    }
