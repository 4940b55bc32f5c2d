"""Tells stories, and checks whether a text is one of them.

One grammar (`plots.STORY`) serves both, as in a definite clause grammar (Pereira and Warren 1980). Every slot has a set
of possible entries. Telling picks one when a slot is first named. Checking removes, word by word, the entries that the
text contradicts, and backtracks when a branch has none left. Standard library only.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from pastkey.errors import InputError

from .plots import SLOTS, STORY, Entry, Node

Slots = Mapping[str, tuple[Entry, ...]]  # the possible entries of each slot


class Mention(NamedTuple):
    """A slot's feature at a place in a text."""

    slot: str
    feature: str
    capital: bool

    def render(self, entry: Entry) -> str:
        text = entry[self.feature]
        return text[0].upper() + text[1:] if self.capital else text


@dataclass(frozen=True)
class Verdict:
    """Whether the grammar accepts a story, and where it fails."""

    ok: bool
    reason: str  # empty when accepted


# --- telling ------------------------------------------------------------------------------------------------------
def stories(seed: int) -> Iterator[str]:
    """Yields endless stories, the same for the same seed: 40 to 70 words each, in one paragraph."""
    rng = random.Random(seed)
    while True:
        yield _tell(STORY, {}, rng)[0]


def _tell(node: Node, told: Slots, rng: random.Random) -> tuple[str, Slots]:
    if isinstance(node, list):
        return _tell(rng.choice(node), told, rng)
    if isinstance(node, tuple):
        sentences = []
        for part in node:
            sentence, told = _tell(part, told, rng)
            sentences.append(sentence)
        return " ".join(filter(None, sentences)), told
    text = ""
    for piece in _parts(node):
        if isinstance(piece, str):
            text += piece
            continue
        if piece.slot not in told:
            told = {**told, piece.slot: (rng.choice(SLOTS[piece.slot]),)}
        text += piece.render(told[piece.slot][0])
    return text, told


# --- checking -----------------------------------------------------------------------------------------------------
def check_story(text: str) -> Verdict:
    """Parses a whole story. Rejects other texts: a wrong name, pronoun, thing, cause or ending."""
    text = text.strip()
    if not text:
        return Verdict(False, "the text is empty")
    parser = _Parser(text)
    if any(end == len(text) for end, _ in parser.parse(STORY, 0, {})):
        return Verdict(True, "")
    before, after = text[: parser.furthest][-40:], text[parser.furthest :][:40]
    return Verdict(False, f"after {before!r} the grammar does not continue with {after!r}")


def acceptance(texts: Iterable[str]) -> float:
    """Returns the share, from 0 to 1, of the texts that the grammar accepts. Raises InputError if there are none."""
    verdicts = [check_story(text).ok for text in texts]
    if not verdicts:
        raise InputError("there is no story to check")
    return sum(verdicts) / len(verdicts)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.furthest = 0  # how far any branch came

    def parse(self, node: Node, start: int, slots: Slots) -> Iterator[tuple[int, Slots]]:
        """Yields every way to read `node` at `start`: where it ends, and the slots' possible entries after it."""
        if isinstance(node, list):
            for choice in node:
                yield from self.parse(choice, start, slots)
        elif isinstance(node, tuple):
            yield from self._parse_sequence(node, start, slots)
        elif node == "" or start == 0:
            yield from self._parse_parts(_parts(node), start, slots)
        elif self.text.startswith(" ", start):
            yield from self._parse_parts(_parts(node), start + 1, slots)

    def _parse_sequence(self, nodes: tuple[Node, ...], start: int, slots: Slots) -> Iterator[tuple[int, Slots]]:
        if not nodes:
            yield start, slots
            return
        for end, narrowed in self.parse(nodes[0], start, slots):
            yield from self._parse_sequence(nodes[1:], end, narrowed)

    def _parse_parts(self, parts: tuple[str | Mention, ...], start: int, slots: Slots) -> Iterator[tuple[int, Slots]]:
        self.furthest = max(self.furthest, start)
        if not parts:
            yield start, slots
            return
        part, rest = parts[0], parts[1:]
        if isinstance(part, str):
            if self.text.startswith(part, start):
                yield from self._parse_parts(rest, start + len(part), slots)
            return
        possible: dict[str, list[Entry]] = {}  # text of the feature -> the entries that have it
        for entry in slots.get(part.slot, SLOTS[part.slot]):
            text = part.render(entry)
            if self.text.startswith(text, start):
                possible.setdefault(text, []).append(entry)
        for text, entries in possible.items():
            yield from self._parse_parts(rest, start + len(text), {**slots, part.slot: tuple(entries)})


@cache
def _parts(template: str) -> tuple[str | Mention, ...]:
    """Returns a template's literal texts and mentions, in order."""
    parts: list[str | Mention] = []
    for literal, name, feature in re.findall(r"([^{}]+)|\{(\w+)(?:\.(\w+))?\}", template):
        parts.append(literal or Mention(name.lower(), feature or "name", name[0].isupper()))
    return tuple(parts)
