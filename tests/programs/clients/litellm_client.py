"""What litellm reads from a server. In an environment of its own."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks no other server for prices
import litellm

litellm.telemetry = False
address, expected = sys.argv[1], json.loads(sys.argv[2])
common = {"model": "openai/tiny", "api_base": f"{address}/v1", "api_key": "any", "num_retries": 0}
hello = [{"role": "user", "content": "Hello"}]

answer = litellm.completion(messages=hello, seed=5, temperature=1, max_tokens=12, **common)
assert answer.choices[0].message.content == expected["chat"], (answer, expected["chat"])
assert answer.usage.completion_tokens == 12
parts = list(
    litellm.completion(
        messages=hello,
        seed=5,
        temperature=1,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **common,
    )
)
assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected["chat"]
assert parts[-1].usage.completion_tokens == 12
schema = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
told = litellm.completion(messages=hello, seed=5, temperature=1, max_tokens=60, response_format=form, **common)
assert set(json.loads(told.choices[0].message.content)) == {"ok"}
tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
called = litellm.completion(
    messages=hello, seed=5, temperature=1, max_tokens=200, tools=[tool], tool_choice="required", **common
)
assert called.choices[0].message.tool_calls[0].function.name == "weather"
text = litellm.text_completion(
    model="text-completion-openai/tiny", api_base=f"{address}/v1", api_key="any", prompt="Hello", seed=5, temperature=1,
    max_tokens=12,
)  # fmt: skip
assert text.choices[0].text == expected["text"]
vectors = litellm.embedding(input=["Hello", "Goodbye"], **common)
for one, wanted in zip(vectors.data, expected["embeddings"], strict=True):
    assert max(abs(x - y) for x, y in zip(one["embedding"], wanted, strict=True)) < 1e-5
made = litellm.responses(input="Hello", temperature=0, max_output_tokens=16, **common)
assert made.output[0].content[0].text.startswith(expected["greedy"])
try:
    litellm.completion(messages=hello, model="openai/other", api_base=f"{address}/v1", api_key="any", num_retries=0)
except litellm.NotFoundError:
    pass
else:
    raise AssertionError("another model was answered")
