"""The requests of this folder's programs to a server, and the answers of the runtime itself: ADDRESS, JSON."""

import json
import sys

address, expected = sys.argv[1], json.loads(sys.argv[2])
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "title": "answer", "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
    "additionalProperties": False,
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def weather(warm: bool) -> str:
    """Tells the weather."""
    return str(warm)


def check_embeddings(vectors):
    for vector, wanted in zip(vectors, expected["embeddings"], strict=True):
        assert max(abs(x - y) for x, y in zip(vector, wanted, strict=True)) < 1e-5
