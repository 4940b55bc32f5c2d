"""A bundle's chat template: messages to the text that the model was trained to see them as.

Templates are Jinja programs that come with the tokenizer. They are rendered as transformers' `apply_chat_template`
renders them, in a sandbox, since they come from wherever the model comes from.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pastkey import names
from pastkey.errors import InputError, IntegrityError, missing_extra
from pastkey.folder import read_json

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
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """The template that a bundle's tokenizer came with. Raises InputError where there is none."""
        config: dict[str, Any] = {}
        if (folder / names.TOKENIZER_CONFIG).is_file():
            config = read_json(folder / names.TOKENIZER_CONFIG)
        file = folder / names.CHAT_TEMPLATE
        if file.is_file():  # it comes first, as in transformers
            try:
                config["chat_template"] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise IntegrityError(f"{file} is not valid UTF-8: it was altered") from None
        return cls(_default(folder, config.get("chat_template")), _special_tokens(config))

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


def _default(folder: Path, found: Any) -> str:
    """The template for plain conversations, of one alone or of several with names."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        named, found = found, found.get("default")
        if named and found is None:
            raise InputError(
                f"{folder} has chat templates named {', '.join(map(str, named))}, and none named default, which is the "
                f"one for conversations: put it into the folder as {names.CHAT_TEMPLATE}"
            )
    if not isinstance(found, str):
        raise InputError(
            f"{folder} has no chat template (chat_template in {names.TOKENIZER_CONFIG}), so that its model continues "
            f"texts and holds no conversation: use  pastkey run {folder} --prompt TEXT"
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
