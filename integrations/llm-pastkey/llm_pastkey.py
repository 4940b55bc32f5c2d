"""pastkey's bundles as models of the `llm` command line.

    llm pastkey add bundle  ->  pastkey-bundles.json in llm's folder  ->  llm -m pastkey/bundle "Once upon a time"

A bundle with a chat template holds conversations; any other continues the prompt's text. Models are loaded at the first
prompt, once per process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import typing
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import click
import llm
import pydantic
from llm.parts import TextPart, ToolCallPart, ToolResultPart

from pastkey.runtime import ChatOptions

_LEFT_OUT = ("json_schema", "logits_processor")  # llm's --schema, and a function, which llm's log cannot hold


class _Options(llm.Options):
    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A command line has texts. Those of lists and mappings are JSON."""
        read = {}
        for name, value in given.items():
            if isinstance(value, str) and str not in typing.get_args(_HINTS.get(name)):
                with contextlib.suppress(ValueError):
                    value = json.loads(value)
            read[name] = value
        return read


_HINTS = {name: hint for name, hint in typing.get_type_hints(ChatOptions).items() if name not in _LEFT_OUT}
Options = pydantic.create_model("Options", __base__=_Options, **{name: (hint, None) for name, hint in _HINTS.items()})


# --- the models ------------------------------------------------------------------------------------------------------
@functools.cache
def loaded(folder: Path) -> Any:
    """The LanguageModel of a bundle. Sync and async models share it."""
    import pastkey  # here, since llm imports its plugins for every command

    return pastkey.load(folder)


class _Bundle:
    can_stream = supports_schema = supports_tools = True
    Options = Options

    def __init__(self, name: str, folder: Path) -> None:
        self.model_id, self.folder = f"pastkey/{name}", folder

    def _open(self, prompt: llm.Prompt, calls: tuple[str, str]) -> Any:
        """The stream of an answer, by the method of the model that answers messages, or by that for texts."""
        lm, messages = loaded(self.folder), messages_of(prompt)
        options = prompt.options.model_dump(exclude_none=True)
        if prompt.schema:
            options["json_schema"] = prompt.schema
        if _has_template(self.folder):
            described = [
                {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
                for tool in prompt.tools
            ]
            tools = [{"type": "function", "function": tool} for tool in described]
            return getattr(lm, calls[0])(messages, tools=tools or None, **options)
        if len(messages) != 1 or prompt.tools:
            raise llm.ModelError(
                f"{self.folder} has no chat template, so that its model continues texts: give one prompt, without a "
                "system prompt, tools or a conversation"
            )
        return getattr(lm, calls[1])(messages[0]["content"], **options)


class Pastkey(_Bundle, llm.Model):
    """A bundle as a model."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str]:
        with contextlib.closing(self._open(prompt, ("stream_chat", "stream"))) as answer:
            for chunk in answer:
                yield chunk.text
        _record(response, answer.completion)


class AsyncPastkey(_Bundle, llm.AsyncModel):
    """A bundle as a model, for event loops."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncGenerator[str, None]:
        async with self._open(prompt, ("astream_chat", "astream")) as answer:
            async for chunk in answer:
                yield chunk.text
        _record(response, answer.completion)


def _record(response: Any, completion: Any) -> None:
    """Tells llm the tokens of the answer, and the calls in it."""
    response.set_usage(
        input=completion.prompt_tokens,
        output=completion.new_tokens,
        details={"cached_tokens": completion.cached_tokens} if completion.cached_tokens else None,
    )
    response.response_json = {"finish_reason": completion.finish_reason}
    for call in completion.tool_calls:
        response.add_tool_call(llm.ToolCall(name=call["name"], arguments=call["arguments"]))


def messages_of(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form, which `lm.stream_chat` accepts."""
    found: list[dict[str, Any]] = []
    for message in prompt.messages:
        text = "\n".join(part.text for part in message.parts if isinstance(part, TextPart))
        calls = [
            {"id": part.tool_call_id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}
            for part in message.parts
            if isinstance(part, ToolCallPart)
        ]
        results = [part for part in message.parts if isinstance(part, ToolResultPart)]
        found += [
            {"role": "tool", "name": part.name, "tool_call_id": part.tool_call_id, "content": part.output}
            for part in results
        ]
        if text or calls or not results:
            found.append({"role": message.role, "content": text} | ({"tool_calls": calls} if calls else {}))
    return found


def _has_template(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))


# --- the registered paths --------------------------------------------------------------------------------------------
def _register() -> Path:
    return Path(llm.user_dir()) / "pastkey-bundles.json"


def registered() -> dict[str, str]:
    """name -> the path of a bundle, or of a folder of bundles."""
    file = _register()
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def bundles() -> dict[str, Path]:
    """name -> bundle. Those of a folder are NAME/BUNDLE, looked up each time."""
    found = {}
    for name, path in registered().items():
        inner = sorted(file.parent for file in Path(path).glob("*/pastkey.json"))
        found |= {f"{name}/{folder.name}": folder for folder in inner} or {name: Path(path)}
    return found


@llm.hookimpl
def register_models(register: Any) -> None:
    """Called by llm, for every command."""
    for name, folder in bundles().items():
        register(Pastkey(name, folder), AsyncPastkey(name, folder))


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Called by llm: `llm pastkey`."""

    @cli.group(name="pastkey")
    def group() -> None:
        """Commands for pastkey's bundles"""

    @group.command()
    @click.argument("path", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
    @click.option("--name", help="The model's name; the folder's by default")
    def add(path: Path, name: str | None) -> None:
        """Register a bundle, or a folder of bundles"""
        if not [*path.glob("pastkey.json"), *path.glob("*/pastkey.json")]:
            raise click.ClickException(f"{path} is not a bundle and contains none: pastkey.json was expected in it")
        _write(registered() | {name or path.name: str(path)})
        click.echo("\n".join(f"pastkey/{one}" for one, folder in bundles().items() if folder.is_relative_to(path)))

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget a name. Its files stay"""
        kept = registered()
        if name not in kept:
            raise click.ClickException(f"{name} is not registered; these are: {', '.join(kept) or 'none'}")
        _write({other: path for other, path in kept.items() if other != name})

    @group.command(name="list")
    def list_() -> None:
        """List the models and their bundles"""
        for name, folder in bundles().items():
            click.echo(f"pastkey/{name}  {folder}")


def _write(paths: dict[str, str]) -> None:
    new = _register().with_suffix(".new")
    new.write_text(json.dumps(paths, indent=2) + "\n", encoding="utf-8")
    new.replace(_register())
