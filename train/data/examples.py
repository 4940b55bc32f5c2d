"""Documents to tokens, in parallel: the ids of texts, and of other formats also which tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pastkey.errors import InputError

from ..tokenizer import TextTokenizer
from .chat import Part, conversation_parts
from .documents import Conversation, Document, PromptAnswer


@dataclass(frozen=True)
class Example:
    """A tokenized document. `ids` and `trained` are (N,)."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]
    end: int | None  # the token that ends its answers; None if none does


def encode_examples(documents: Sequence[Document], tokenizer: TextTokenizer) -> list[Example]:
    """Tokenizes documents of any format. Raises InputError naming the document that cannot be."""
    parts = []
    for document in documents:
        try:
            parts.append(_parts_of(document, tokenizer))
        except InputError as error:
            raise InputError(f"{document.place}: {error}") from None
    texts = ["".join(text for text, _ in pieces) for pieces in parts]
    encoded = tokenizer.encode_many(texts, [document.place for document in documents], offsets=True)
    return [
        _example(document, pieces, found.ids, found.offsets, tokenizer)
        for document, pieces, found in zip(documents, parts, encoded, strict=True)
    ]


def _parts_of(document: Document, tokenizer: TextTokenizer) -> list[Part]:
    content = document.content
    if isinstance(content, Conversation):
        return conversation_parts(content, tokenizer)
    if isinstance(content, PromptAnswer):
        return [(content.prompt, False), (content.completion, True)]
    return [(content, True)]


def _example(
    document: Document,
    parts: list[Part],
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    tokenizer: TextTokenizer,
) -> Example:
    """Marks the trained tokens. A token never spans a boundary: a prompt is tokenized as it will be for generation."""
    boundaries = np.cumsum([0] + [len(text) for text, _ in parts])
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    first = np.searchsorted(starts, boundaries[1:-1])  # the first token of each part but the first one
    spanned = [
        bool(place) and ends[place - 1] > boundary for place, boundary in zip(first, boundaries[1:-1], strict=True)
    ]
    if any(spanned):
        found = tokenizer.encode_many([text for text, _ in parts], [document.place] * len(parts))
        pieces = [encoding.ids for encoding in found]
    else:
        pieces = [piece.tolist() for piece in np.split(np.array(ids, np.int64), first)]
    turns = isinstance(document.content, Conversation)
    token_ids: list[int] = []
    trained: list[bool] = []
    end = None if turns else tokenizer.end
    for piece, (_, is_trained) in zip(pieces, parts, strict=True):
        wanted = len(piece)
        if turns and is_trained:  # text of a template behind the end-of-turn token is never generated
            wanted = _behind_turn(piece, tokenizer)
            end = piece[wanted - 1] if wanted else end
            wanted = wanted or len(piece)
        token_ids += piece
        trained += [is_trained] * wanted + [False] * (len(piece) - wanted)
    if not turns:
        begin = [] if tokenizer.begin is None else [tokenizer.begin]
        token_ids, trained = [*begin, *token_ids, tokenizer.end], [*[False] * len(begin), *trained, True]
    return Example(np.array(token_ids, np.int64), np.array(trained, np.bool_), end)


def _behind_turn(ids: Sequence[int], tokenizer: TextTokenizer) -> int:
    """Returns how many of these tokens there are up to the last special one, which ends the turn; 0 without one."""
    return next((number for number in range(len(ids), 0, -1) if ids[number - 1] in tokenizer.special_ids), 0)
