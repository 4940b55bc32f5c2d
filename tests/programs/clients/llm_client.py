"""The fields that llm reads from a server. In a separate environment, with its settings in $LLM_USER_PATH."""

import json
import os
from pathlib import Path

from asked import SCHEMA, address, expected, weather

entry = {
    "model_id": "here", "model_name": "tiny", "api_base": f"{address}/v1", "api_key_name": "any",
    "supports_schema": True, "supports_tools": True,
}  # fmt: skip
folder = Path(os.environ["LLM_USER_PATH"])
(folder / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML
(folder / "keys.json").write_text(json.dumps({"any": "any"}))

import llm

model, drawn = llm.get_model("here"), {"seed": 5, "temperature": 1}
answer = model.prompt("Hello", **drawn, max_tokens=12)  # streamed
assert answer.text() == expected["chat"], (answer.text(), expected["chat"])
assert answer.usage().output == 12
assert model.prompt("Hello", stream=False, **drawn, max_tokens=12).text() == expected["chat"]
assert set(json.loads(model.prompt("Hello", schema=SCHEMA, **drawn, max_tokens=60).text())) == {"ok"}
asked = model.prompt("Hello", tools=[weather], **drawn, max_tokens=60)  # a random model need not call it
assert isinstance(asked.text(), str)
