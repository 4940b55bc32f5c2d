"""A bundle's chat template: messages to the text that the model was trained to see them as.

Templates are Jinja programs that come with the tokenizer. They are rendered as transformers' `apply_chat_template`
renders them, in a sandbox, since they come from wherever the model comes from.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pastkey import names
from pastkey.bundle import Bundle
from pastkey.errors import InputError, missing_extra
from pastkey.folder import read_json, read_text

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, str]  # "role" ("system", "user" or "assistant") and "content"


class ChatTemplate:
    """A compiled template with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens` are those of tokenizer_config.json, say {"bos_token": "<s>"}.

        Raises InputError for a template that cannot be compiled, MissingExtraError without jinja2.
        """
        environment = _environment()
        import jinja2

        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None
        except Exception as error:  # Python's own limits, such as too many nested blocks
            raise InputError(f"the chat template cannot be compiled: {error}") from None

    @classmethod
    def from_bundle(cls, bundle: Bundle, file: str | Path | None = None) -> ChatTemplate:
        """The template that a bundle's tokenizer came with, or the one in `file`, with the bundle's special tokens.

        Of the bundle's files only those are read that its manifest lists. Raises InputError where there is no template
        or it cannot be used, MissingFileError where `file` is none.
        """
        config: dict[str, Any] = {}
        if names.TOKENIZER_CONFIG in bundle.manifest.files:
            config = read_json(bundle.path / names.TOKENIZER_CONFIG)
        tokens = _special_tokens(config)
        if file is not None:
            return cls(_read(file), tokens)
        if names.CHAT_TEMPLATE in bundle.manifest.files:  # it comes first, as in transformers
            return cls(_read(bundle.path / names.CHAT_TEMPLATE), tokens)
        return cls(_default(bundle.path, config.get("chat_template")), tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant speaks next.

        Raises InputError with the template's own words where it does not take these messages.
        """
        variables = self._special_tokens | {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(variables)
        except Exception as error:  # a template is a program: it may fail in any way
            reason = str(error) or type(error).__name__
            raise InputError(f"the chat template does not take this conversation: {reason}") from None


def _read(file: str | Path) -> str:
    if not isinstance(file, str | os.PathLike):
        raise InputError(f"template is {file!r:.60}; the path of a chat template was expected, as a str or a Path")
    return read_text(Path(file))


def _default(folder: Path, found: Any) -> str:
    """The template for plain conversations, of one alone or of several with names."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        named, found = found, found.get("default")
        if named and found is None:
            raise InputError(
                f"{folder} has chat templates named {', '.join(map(str, named))}, and none named default, which is the "
                "one for conversations: write one to a file, and take it with --template FILE (in Python, template=)"
            )
    if not isinstance(found, str):
        raise InputError(
            f"{folder} has no chat template (chat_template in {names.TOKENIZER_CONFIG}), so that its model continues "
            f"texts and holds no conversation: use  pastkey run {shlex.quote(str(folder))} --prompt TEXT  or take a "
            "template with --template FILE (in Python, template=)"
        )
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, which are written as a string or as an object with its content."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _environment() -> jinja2.Environment:
    """The sandbox, with what templates rely on beyond plain Jinja."""
    try:
        import jinja2
        import jinja2.ext
        from jinja2 import nodes, parser, sandbox
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None

    class GenerationBlock(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: marks what the assistant says, for training; here its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own form

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _time
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter of this name escapes what would be HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _time(form: str) -> str:
    return datetime.datetime.now().strftime(form)
