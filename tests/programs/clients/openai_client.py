"""What the openai package reads from a server: one program for its major versions. In an environment of its own."""

import contextlib
import json
import sys

import openai
from openai import OpenAI

address, expected = sys.argv[1], json.loads(sys.argv[2])
client = OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
hello = [{"role": "user", "content": "Hello"}]
drawn = {"model": "tiny", "seed": 5, "max_tokens": 12}
schema = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
tool = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}}}},
}

# --- models -------------------------------------------------------------------------------------------------------
assert [one.id for one in client.models.list()] == ["tiny"]
assert client.models.retrieve("tiny").id == "tiny"

# --- chat ---------------------------------------------------------------------------------------------------------
answer = client.chat.completions.create(messages=hello, **drawn, logprobs=True, top_logprobs=3)
choice = answer.choices[0]
assert choice.message.content == expected["chat"], (choice.message.content, expected["chat"])
assert choice.finish_reason == "length"
assert choice.message.role == "assistant"
assert answer.usage.completion_tokens == 12
assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
written = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
assert written.decode(errors="replace") == choice.message.content
assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in choice.logprobs.content)

stream = client.chat.completions.create(messages=hello, **drawn, stream=True, stream_options={"include_usage": True})
*parts, last = list(stream)
assert last.choices == []
assert last.usage.completion_tokens == 12
assert all(part.usage is None for part in parts)
assert [part.choices[0].delta.role for part in parts if part.choices[0].delta.role] == ["assistant"]
assert "".join(part.choices[0].delta.content or "" for part in parts) == expected["chat"]
assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]

with client.chat.completions.stream(messages=hello, **drawn) as events:  # its final answer must not be cut
    deltas = []
    with contextlib.suppress(openai.LengthFinishReasonError):  # the client's own verdict on a text that was cut
        for event in events:
            deltas.append(event.delta if event.type == "content.delta" else "")  # noqa: PERF401
assert "".join(deltas) == expected["chat"]

two = client.chat.completions.create(messages=hello, **(drawn | {"seed": 7}), n=2)
assert [one.index for one in two.choices] == [0, 1]
again = client.chat.completions.create(messages=hello, **(drawn | {"seed": 7}), n=2)
assert [one.message.content for one in two.choices] == [one.message.content for one in again.choices]

# --- a form, tools ------------------------------------------------------------------------------------------------
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
told = client.chat.completions.create(messages=hello, **(drawn | {"max_tokens": 60}), response_format=form)
assert set(json.loads(told.choices[0].message.content)) == {"ok"}

called = client.chat.completions.create(
    messages=hello, **(drawn | {"max_tokens": 200}), tools=[tool], tool_choice="required"
)
(call,) = called.choices[0].message.tool_calls
assert (call.type, call.function.name) == ("function", "weather")
assert isinstance(json.loads(call.function.arguments), dict)
assert called.choices[0].finish_reason == "tool_calls"
with client.chat.completions.stream(
    messages=hello, **(drawn | {"max_tokens": 200}), tools=[tool], tool_choice="required"
) as events:
    streamed = events.get_final_completion().choices[0].message.tool_calls
assert streamed[0].function.name == "weather"
assert json.loads(streamed[0].function.arguments) == json.loads(call.function.arguments)

# --- the other routes ---------------------------------------------------------------------------------------------
text = client.completions.create(prompt="Hello", **drawn)
assert text.choices[0].text == expected["text"]
assert (
    "".join(part.choices[0].text for part in client.completions.create(prompt="Hello", **drawn, stream=True))
    == (expected["text"])
)

vectors = client.embeddings.create(model="tiny", input=["Hello", "Goodbye"])  # base64, by the client's own choice
plain = client.embeddings.create(model="tiny", input=["Hello", "Goodbye"], encoding_format="float")
assert [one.index for one in vectors.data] == [0, 1]
for one, other, wanted in zip(vectors.data, plain.data, expected["embeddings"], strict=True):
    assert max(abs(x - y) for x, y in zip(one.embedding, other.embedding, strict=True)) < 1e-6
    assert max(abs(x - y) for x, y in zip(one.embedding, wanted, strict=True)) < 1e-5

made = client.responses.create(model="tiny", input="Hello", temperature=0, max_output_tokens=12)
assert made.output_text == expected["greedy"]
assert made.incomplete_details.reason == "max_output_tokens"
kinds = [event.type for event in client.responses.create(
    model="tiny", input="Hello", temperature=0, max_output_tokens=12, stream=True
)]  # fmt: skip
assert kinds[:2] == ["response.created", "response.in_progress"]
assert kinds[-1] == "response.incomplete"
with client.responses.stream(model="tiny", input="Hello", temperature=0, max_output_tokens=12) as events:
    collected = "".join(event.delta for event in events if event.type == "response.output_text.delta")
assert collected == expected["greedy"]

# --- mistakes -----------------------------------------------------------------------------------------------------
for body, error, param in (
    ({"messages": hello, "model": "gpt-4"}, openai.NotFoundError, "model"),
    ({"messages": hello, "model": "tiny", "temperature": -1}, openai.BadRequestError, None),
    ({"messages": hello, "model": "tiny", "extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
    ({"messages": [{"role": "user", "content": "x" * 5000}], "model": "tiny"}, openai.BadRequestError, "messages"),
):
    found = None
    try:
        client.chat.completions.create(**body)
    except error as raised:
        found = raised.body
    assert found, body
    assert found["message"], found
    assert param in (None, found["param"]), found
print(openai.__version__)
