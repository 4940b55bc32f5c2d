"""Run in an environment of this package by tests/programs/test_integrations.py, which makes the bundles."""

import asyncio
import json
import os
from pathlib import Path

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm_pastkey import loaded
from pydantic import BaseModel

BUNDLES = Path(os.environ["PASTKEY_TEST_BUNDLES"])  # chat/ has a chat template for tools, plain/ has none
CALL = r'<tool_call>\{"name": "add", "arguments": \{"a": 1, "b": 2\}\}</tool_call>'


def run(*words: str) -> str:
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    run("pastkey", "add", str(BUNDLES), "--name", "all")


def model(name: str = "chat") -> llm.Model:
    return llm.get_model(f"pastkey/all/{name}")


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]


def test_a_folder_or_a_bundle_is_registered_and_forgotten(tmp_path: Path) -> None:
    assert run("pastkey", "add", str(BUNDLES / "plain")) == "pastkey/all/plain\npastkey/plain\n"
    assert [line.split()[0] for line in run("pastkey", "list").splitlines()] == [
        "pastkey/all/chat",
        "pastkey/all/plain",
        "pastkey/plain",
    ]
    assert "pastkey/plain" in run("models")
    run("pastkey", "remove", "all")
    assert run("pastkey", "list").startswith("pastkey/plain ")
    for words in (["add", str(tmp_path)], ["add", str(tmp_path / "none")], ["remove", "all"]):
        assert CliRunner().invoke(cli, ["pastkey", *words]).exit_code != 0


def test_an_answer_is_streamed_and_counted_as_the_runtime_gives_it() -> None:
    response = model().prompt("Hello", temperature=1.0, seed=3, max_new_tokens=12, stop="q")
    pieces = list(response)
    expected = loaded(BUNDLES / "chat").generate_chat(
        messages("Hello"), temperature=1.0, seed=3, max_new_tokens=12, stop="q"
    )
    assert len(pieces) > 2
    assert "".join(pieces) == response.text() == expected.text
    assert (response.input_tokens, response.output_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert response.response_json == {"finish_reason": expected.finish_reason}
    assert run("-m", "pastkey/all/chat", "Hello", "-o", "max_new_tokens", "12", "-o", "seed", "3") != ""


def test_a_conversation_has_its_earlier_messages() -> None:
    conversation = model().conversation()
    first = conversation.prompt("One", system="Short.", max_new_tokens=9).text()
    second = conversation.prompt("Two", max_new_tokens=9).text()
    said = [{"role": "system", "content": "Short."}, *messages("One", first, "Two")]
    assert second == loaded(BUNDLES / "chat").generate_chat(said, max_new_tokens=9).text


def test_a_schema_holds_and_lists_are_read_from_the_command_line() -> None:
    class City(BaseModel, extra="forbid"):
        wet: bool

    answer = model().prompt("Hello", schema=City, max_new_tokens=99).text()
    assert City.model_validate_json(answer)
    assert run("-m", "pastkey/all/chat", "x", "-o", "choices", '["yes", "no"]').strip() in ("yes", "no")


def test_a_tool_is_called() -> None:
    def add(a: int, b: int) -> int:
        return a + b

    response = model().prompt("Hello", tools=[add], regex=CALL, max_new_tokens=99)
    assert response.text() == ""
    assert [(call.name, call.arguments) for call in response.tool_calls()] == [("add", {"a": 1, "b": 2})]
    result = llm.ToolResult(name="add", output="3", tool_call_id=response.tool_calls()[0].tool_call_id)
    before = response.prompt.messages + response.messages()
    after = model().prompt(messages=before, tool_results=[result], tools=[add], max_new_tokens=5)
    plain = model().prompt("Hello", tools=[add], max_new_tokens=5)
    assert after.text() is not None
    assert after.input_tokens > plain.input_tokens if plain.text() is not None else False


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("temperature", "-1", "temperature is -1.0; it must be a number from 0"),
        ("max_new_tokens", "many", "max_new_tokens"),
        ("warmth", "1", "warmth"),
    ],
)
def test_a_wrong_option_is_one_error(option: str, value: str, sentence: str) -> None:
    done = CliRunner().invoke(cli, ["-m", "pastkey/all/chat", "x", "-o", option, value])
    assert done.exit_code != 0
    assert sentence in done.output


def test_an_event_loop_gets_the_same_text() -> None:
    async def answer() -> str:
        return await llm.get_async_model("pastkey/all/chat").prompt("Hello", max_new_tokens=9).text()

    assert asyncio.run(answer()) == model().prompt("Hello", max_new_tokens=9).text()


def test_without_a_template_the_prompt_goes_on() -> None:
    plain = model("plain")
    text = plain.prompt("Hello", max_new_tokens=9).text()
    assert text == loaded(BUNDLES / "plain").generate("Hello", max_new_tokens=9).text
    with pytest.raises(llm.ModelError, match="has no chat template"):
        plain.prompt("Hello", system="Short.").text()


def test_the_log_has_the_options() -> None:
    run("-m", "pastkey/all/chat", "Hello", "-o", "max_new_tokens", "3", "-o", "choices", '["yes"]')
    (logged,) = json.loads(run("logs", "--json"))
    assert logged["options_json"] == {"max_new_tokens": 3, "choices": ["yes"]}
    assert logged["response"] == "yes"
