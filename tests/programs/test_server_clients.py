"""Clients of OpenAI's API on `pastkey serve`, each in a separate environment. CI runs the openai package here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.environments import environment

from ..shared import divided, ran
from .serving import MODEL, serving, write_tiny

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("llguidance", reason="llguidance is not installed")

pytestmark = pytest.mark.slow

# name -> its environment, or None for that of the tests, and the program that it runs.
CLIENTS: dict[str, tuple[list[str] | None, str]] = {
    "openai": (None, "openai_client.py"),
    "openai-3": (["openai>=3,<4"], "openai_client.py"),
    "openai-2": (["openai>=2,<3"], "openai_client.py"),
    "langchain-openai": (["langchain-openai>=1"], "langchain_client.py"),
    "litellm": (["litellm>=1"], "litellm_client.py"),
    "llm": (["llm>=0.36"], "llm_client.py"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("served") / "bundle").path


@pytest.fixture(scope="module")
def address(bundle, tmp_path_factory):
    with serving(bundle, "--alias", MODEL, log=tmp_path_factory.mktemp("log") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def expected(bundle):
    """The answers of the runtime itself, as JSON."""
    from pastkey.runtime import load

    with load(bundle, threads=1) as lm:
        chat = [{"role": "user", "content": "Hello"}]
        told = {
            "chat": lm.generate_chat(chat, max_new_tokens=12, temperature=1.0, seed=5).text,
            "greedy": lm.generate_chat(chat, max_new_tokens=12).text,
            "text": lm.generate("Hello", max_new_tokens=12, temperature=1.0, seed=5).text,
            "embeddings": [vector.tolist() for vector in lm.embed(["Hello", "Goodbye"])],
        }
        return json.dumps(told)


@pytest.mark.parametrize("name", divided(CLIENTS, ci=["openai"]))
def test_a_client_reads_what_the_runtime_answers(name, address, expected, tmp_path):
    requirements, program = CLIENTS[name]
    if requirements is None:
        pytest.importorskip("openai", reason="openai is not installed")
    python = Path(sys.executable) if requirements is None else environment(f"client-{name}", requirements)
    given = os.environ | {"LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
    client = Path(__file__).parent / "clients" / program
    ran(python, client, address, expected, cwd=tmp_path, env=given, timeout=300)
