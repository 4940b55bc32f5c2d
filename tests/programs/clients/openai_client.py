"""The fields that openai reads from a server: one program for its major versions. In a separate environment."""

import contextlib
import json

import openai
from asked import FORM, HELLO, TOOL, address, check_embeddings, expected
from openai import OpenAI

client = OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
drawn = {"model": "tiny", "seed": 5, "max_tokens": 12}
chat, long = drawn | {"messages": HELLO}, drawn | {"messages": HELLO, "max_tokens": 200}
assert [one.id for one in client.models.list()] == ["tiny"]

# --- chat ---------------------------------------------------------------------------------------------------------
answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=3)
choice = answer.choices[0]
assert choice.message.content == expected["chat"], (choice.message.content, expected["chat"])
assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 12)
written = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
assert written.decode(errors="replace") == choice.message.content
assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in choice.logprobs.content)

stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
*parts, last = list(stream)
assert (last.choices, last.usage.completion_tokens) == ([], 12)
assert [part.choices[0].delta.role for part in parts if part.choices[0].delta.role] == ["assistant"]
assert "".join(part.choices[0].delta.content or "" for part in parts) == expected["chat"]
assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]

with client.chat.completions.stream(**chat) as events:  # its final answer must not be cut
    deltas = []
    with contextlib.suppress(openai.LengthFinishReasonError):  # the client's own verdict on a text that was cut
        for event in events:
            deltas.append(event.delta if event.type == "content.delta" else "")  # noqa: PERF401
assert "".join(deltas) == expected["chat"]

# --- a form, tools ------------------------------------------------------------------------------------------------
told = client.chat.completions.create(**(chat | {"max_tokens": 60}), response_format=FORM)
assert set(json.loads(told.choices[0].message.content)) == {"ok"}
called = client.chat.completions.create(**long, tools=[TOOL], tool_choice="required")
(call,) = called.choices[0].message.tool_calls
assert (call.type, call.function.name, called.choices[0].finish_reason) == ("function", "weather", "tool_calls")
with client.chat.completions.stream(**long, tools=[TOOL], tool_choice="required") as events:
    (streamed,) = events.get_final_completion().choices[0].message.tool_calls
assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)

# --- the other routes ---------------------------------------------------------------------------------------------
assert client.completions.create(prompt="Hello", **drawn).choices[0].text == expected["text"]
parts = client.completions.create(prompt="Hello", **drawn, stream=True)
assert "".join(part.choices[0].text for part in parts) == expected["text"]
for more in ({}, {"encoding_format": "float"}):  # base64, by the client's own choice
    vectors = client.embeddings.create(model="tiny", input=["Hello", "Goodbye"], **more)
    check_embeddings(one.embedding for one in vectors.data)
given = {"model": "tiny", "input": "Hello", "temperature": 0, "max_output_tokens": 12}
made = client.responses.create(**given)
assert (made.output_text, made.incomplete_details.reason) == (expected["greedy"], "max_output_tokens")
with client.responses.stream(**given) as events:
    collected = "".join(event.delta for event in events if event.type == "response.output_text.delta")
assert collected == expected["greedy"]

# --- mistakes -----------------------------------------------------------------------------------------------------
for body, error, param in (
    ({"messages": HELLO, "model": "gpt-4"}, openai.NotFoundError, "model"),
    ({"messages": HELLO, "model": "tiny", "extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
    ({"messages": [{"role": "user", "content": "x" * 5000}], "model": "tiny"}, openai.BadRequestError, "messages"),
):
    found = None
    try:
        client.chat.completions.create(**body)
    except error as raised:
        found = raised.body
    assert found, body
    assert found["message"], body
    assert found["param"] == param, found
print(openai.__version__)
