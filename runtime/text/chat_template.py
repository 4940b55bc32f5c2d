"""A bundle's chat template, which renders messages to the text that the model was trained on.

Templates are Jinja programs that come with the tokenizer. They render as in transformers' `apply_chat_template`, in
Jinja's sandbox, with limits on source and output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError
from pastkey.files.folder import read_json, read_text
from pastkey.values import as_path

from .environment import MAX_OUTPUT, MAX_SOURCE, environment, plain

# "role" ("system", "user", "assistant" or "tool") and "content", a text or its parts; "tool_calls" and other keys that
# the template reads.
Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates use for a model's reasoning
_TAG = "<continue-here> "


class ChatTemplate:
    """A compiled template with its special tokens.

    Attributes:
        source: The template's text.
        variables: The names that it reads, such as "messages", "tools" or "enable_thinking".
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        """`special_tokens` are those of tokenizer_config.json, for example {"bos_token": "<s>"}.

        Raises InputError for a template that cannot be compiled, MissingExtraError without jinja2.
        """
        made = environment()
        import jinja2
        import jinja2.meta

        if len(source) > MAX_SOURCE:
            raise InputError(
                f"the chat template cannot be compiled: it has {len(source):,} characters; at most "
                f"{MAX_SOURCE:,} are allowed"
            )
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            reader = jinja2.meta.TrackingCodeGenerator(made)  # as find_undeclared_variables, which computes constants
            reader.optimizer = None
            reader.visit(made.parse(source))
            self.variables = frozenset(reader.undeclared_identifiers)
            self._template = made.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            reason = (error.message or "")[:1000]
            raise InputError(f"the chat template is not valid Jinja: {reason} (line {error.lineno})") from None
        except MemoryError:
            raise
        except Exception as error:  # Python's limits, such as too many nested blocks
            raise InputError(f"the chat template cannot be compiled: {_reason(error)}") from None

    @classmethod
    def from_bundle(cls, bundle: Bundle, source: str | None = None, *, tools: bool = False) -> ChatTemplate:
        """The template with the text `source`, or the bundle's own one, with the bundle's special tokens.

        Of several named templates it chooses the default one, or with `tools` the one named tool_use. It reads only
        bundle files that the manifest lists. Raises InputError if there is no usable template.
        """
        found, tokens = (
            template_of(bundle, tools=tools) if source is None else (source, special_tokens(_config(bundle)))
        )
        return cls(found, tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Renders the conversation up to the start of the next answer.

        Args:
            messages: The conversation.
            tools: JSON schemas of functions, as `tool_schemas` makes them.
            documents: Texts to answer from, with the keys that the template reads, mostly "title" and "text".
            continue_final_message: Ends right behind the content of the last message, for the model to continue it.
            **variables: Further variables of the template. `add_generation_prompt=False` ends behind the last message.

        Raises:
            InputError: The template rejects these messages, in its own words, or writes more than MAX_OUTPUT
                characters.
        """
        try:
            given = [_with_reasoning(plain(message)) for message in messages]
            content = _mark_end(given) if continue_final_message else ""
            values = {"add_generation_prompt": not continue_final_message} | plain(variables)
            values |= {"messages": given, "tools": _listed(tools), "documents": _listed(documents)}
            pieces, length = [], 0
            for piece in self._template.generate(self._special_tokens | values):
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise ValueError(f"it writes more than {MAX_OUTPUT:,} characters")
                pieces.append(piece)
            text = "".join(pieces)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise InputError(f"the chat template does not accept this conversation: {_reason(error)}") from None
        return _up_to_mark(text, content) if continue_final_message else text


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:1000]


def _listed(values: Iterable[Any] | None) -> list[Any] | None:
    return None if values is None else [plain(value) for value in values]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Copies a message's reasoning to all names that templates use."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Puts a mark behind the last message's text; returns the text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + _TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _TAG
            return text
    raise ValueError("the last message has no text to continue")


def _up_to_mark(text: str, content: str) -> str:
    place = text.rfind(_TAG.strip())
    if place < 0 or content.strip() not in text:
        raise InputError(
            "the chat template does not accept this conversation: it does not write the last message unchanged, so "
            "that it cannot be continued"
        )
    # A template that trims contents would also have trimmed the spaces before the mark.
    return text[:place] if text.startswith(_TAG, place) else text[:place].rstrip()


def template_of(bundle: Bundle, *, tools: bool = False) -> tuple[str, dict[str, str]]:
    """The text of a bundle's template, and its special tokens. See `ChatTemplate.from_bundle`."""
    config = _config(bundle)
    if names.CHAT_TEMPLATE in bundle.manifest.files:  # has precedence, as in transformers
        return read_template(bundle.path / names.CHAT_TEMPLATE), special_tokens(config)
    return _chosen(bundle.path, config.get("chat_template"), tools), special_tokens(config)


def _config(bundle: Bundle) -> dict[str, Any]:
    listed = names.TOKENIZER_CONFIG in bundle.manifest.files
    return read_json(bundle.path / names.TOKENIZER_CONFIG) if listed else {}


def read_template(file: str | Path) -> str:
    """Reads a template. Raises MissingFileError, or InputError for an invalid path or a file that is not text."""
    return read_text(as_path(file, "template", "the path of a chat template"))


def _chosen(folder: Path, found: Any, tools: bool) -> str:
    """The only template, or of several named ones the default one or the one for tools."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        named, found = found, (found.get("tool_use") if tools else None) or found.get("default")
        if named and found is None:
            raise InputError(
                f"{folder} has chat templates named {', '.join(map(str, named))}, and none named default, which is the "
                "one for conversations: write one to a file, and name it with --template FILE (in Python, template=)"
            )
    if not isinstance(found, str):
        raise InputError(
            f"{folder} has no chat template (chat_template in {names.TOKENIZER_CONFIG}), so that its model continues "
            "texts and holds no conversation: use  pastkey run BUNDLE --prompt TEXT  (on a server, /v1/completions), "
            "or give a template with --template FILE (in Python, template=; for a server, export with --chat-template)"
        )
    return found


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and similar, each given as a string or as an object with its content."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens
