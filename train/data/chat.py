"""Conversations as the chat template writes them, cut into the text that the model reads and the text that it learns.

transformers renders. A template with {% generation %} marks the assistant's text itself. Otherwise the conversation is
rendered up to each assistant's turn and behind it, and the text between is the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pastkey.errors import InputError, missing_extra

from ..tokenizer import TextTokenizer
from .documents import Conversation

Part = tuple[str, bool]  # a text, and whether it is trained
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def conversation_parts(conversation: Conversation, tokenizer: TextTokenizer) -> list[Part]:
    """Returns the rendered conversation in parts. Raises InputError if the turns of the assistant cannot be found."""
    if tokenizer.chat_template is None:
        raise InputError(
            "messages need a tokenizer with a chat template, and this one has none: put a chat_template.jinja next to "
            "the tokenizer.json of --init, or of --tokenizer for a new model"
        )
    if _GENERATION.search(tokenizer.chat_template):
        text, spans = _render(conversation, tokenizer, marked=True)
    else:
        text, spans = _by_prefixes(conversation, tokenizer)
    parts, place = [], 0
    for start, end in spans:
        parts += [(text[place:start], False), (text[start:end], True)]
        place = end
    return [part for part in parts if part[0]] + [(text[place:], False)]


def _by_prefixes(conversation: Conversation, tokenizer: TextTokenizer) -> tuple[str, list[tuple[int, int]]]:
    text, _ = _render(conversation, tokenizer)
    spans = []
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = Conversation(conversation.messages[:number], conversation.tools)
        behind = Conversation(conversation.messages[: number + 1], conversation.tools)
        start, _ = _render(before, tokenizer, add_generation_prompt=True)
        end, _ = _render(behind, tokenizer)
        if not (text.startswith(end) and end.startswith(start)):
            raise InputError(
                f"the chat template does not write message {number + 1} as a continuation of those before it, so that "
                "the assistant's tokens cannot be told: put {% generation %} and {% endgeneration %} around the "
                "assistant's text in the template, with its end-of-turn token"
            )
        spans.append((len(start), len(end)))
    return text, spans


def _render(
    conversation: Conversation, tokenizer: TextTokenizer, *, marked: bool = False, **variables: Any
) -> tuple[str, Sequence[tuple[int, int]]]:
    """Returns the text, and with `marked` where the assistant's texts begin and end."""
    try:
        from transformers.utils import chat_template_utils
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    render: Any = chat_template_utils.render_jinja_template
    try:
        texts, spans = render(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=marked,
            **dict(tokenizer.special_tokens) | variables,
        )
    except ImportError as error:  # of jinja2, which transformers asks for here
        raise InputError(f"the chat template cannot be rendered: {error}") from None
    except Exception as error:  # a template is a program and may raise anything
        raise InputError(f"the chat template does not accept this conversation: {str(error)[:1000]}") from None
    return texts[0], spans[0] if marked else ()
