"""The fields that litellm reads from a server. In a separate environment."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks no other server for prices
import litellm
from asked import FORM, HELLO, TOOL, address, check_embeddings, expected

litellm.telemetry = False
common = {"model": "openai/tiny", "api_base": f"{address}/v1", "api_key": "any", "num_retries": 0}
drawn = {"seed": 5, "temperature": 1, "max_tokens": 12}
chat = common | drawn | {"messages": HELLO}

answer = litellm.completion(**chat)
assert answer.choices[0].message.content == expected["chat"], (answer, expected["chat"])
assert answer.usage.completion_tokens == 12
parts = list(litellm.completion(**chat, stream=True, stream_options={"include_usage": True}))
assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == expected["chat"]
assert parts[-1].usage.completion_tokens == 12
told = litellm.completion(**(chat | {"max_tokens": 60}), response_format=FORM)
assert set(json.loads(told.choices[0].message.content)) == {"ok"}
called = litellm.completion(**(chat | {"max_tokens": 200}), tools=[TOOL], tool_choice="required")
assert called.choices[0].message.tool_calls[0].function.name == "weather"
text = litellm.text_completion(**(common | drawn | {"model": "text-completion-openai/tiny"}), prompt="Hello")
assert text.choices[0].text == expected["text"]
check_embeddings(one["embedding"] for one in litellm.embedding(input=["Hello", "Goodbye"], **common).data)
made = litellm.responses(input="Hello", temperature=0, max_output_tokens=16, **common)
assert made.output[0].content[0].text.startswith(expected["greedy"])
