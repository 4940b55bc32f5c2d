"""The fields that langchain-openai reads from a server. In a separate environment."""

import asyncio

from asked import SCHEMA, address, check_embeddings, expected, weather
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

common = {"base_url": f"{address}/v1", "api_key": "any", "model": "tiny", "max_retries": 0}
chat = ChatOpenAI(**common, seed=5, temperature=1, max_tokens=12, stream_usage=True)
answer = chat.invoke("Hello")
assert answer.content == expected["chat"], (answer.content, expected["chat"])
assert answer.usage_metadata["output_tokens"] == 12
parts = list(chat.stream("Hello"))
assert "".join(part.content for part in parts) == expected["chat"]
assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 12
assert [one.content for one in chat.batch(["Hello"] * 5)] == [expected["chat"]] * 5
assert asyncio.run(chat.ainvoke("Hello")).content == expected["chat"]

long = ChatOpenAI(**common, seed=5, temperature=1, max_tokens=200)
assert set(long.with_structured_output(SCHEMA, method="json_schema", strict=True).invoke("Hello")) == {"ok"}
(call,) = long.bind_tools([weather], tool_choice="required").invoke("Hello").tool_calls
assert call["name"] == "weather"

assert OpenAI(**common, seed=5, temperature=1, max_tokens=12).invoke("Hello") == expected["text"]
embeddings = OpenAIEmbeddings(base_url=f"{address}/v1", api_key="any", model="tiny", check_embedding_ctx_length=False)
check_embeddings(embeddings.embed_documents(["Hello", "Goodbye"]))
responses = ChatOpenAI(**common, temperature=0, max_tokens=12, use_responses_api=True)
assert responses.invoke("Hello").text == expected["greedy"]
