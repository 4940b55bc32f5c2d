"""The built-in corpus: little stories told from a grammar, and a parser that knows whether a text is one of them.

    python -m pastkey.train.stories --count 3            tells three stories
    python -m pastkey.train.stories --check FILE         the share of a file's stories that the grammar accepts

One grammar (`plots.STORY`) serves both ways, as in a definite clause grammar (Pereira and Warren 1980). Every slot has
a set of entries it can still be. Telling picks one where a slot is first named; checking strikes out, word by word,
the entries that the text contradicts, and backtracks where a branch has none left. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pastkey.command import natural_int, print_json
from pastkey.errors import InputError, PastkeyError
from pastkey.files.folder import read_text
from pastkey.values import is_unicode

from .story_plots import SLOTS, STORY, Entry, Node

Slots = Mapping[str, tuple[Entry, ...]]  # what each slot can still be


class Mention(NamedTuple):
    """A place in a text where a slot's feature stands."""

    slot: str
    feature: str
    capital: bool

    def render(self, entry: Entry) -> str:
        text = entry[self.feature]
        return text[0].upper() + text[1:] if self.capital else text


@dataclass(frozen=True)
class Verdict:
    """Whether the grammar accepts a story, and where it does not."""

    ok: bool
    reason: str  # empty when accepted


# --- telling ------------------------------------------------------------------------------------------------------
def stories(seed: int) -> Iterator[str]:
    """Endless stories, the same for the same seed: 60 to 130 words each, in one paragraph."""
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
            taken = _settled_names(told)
            told = {**told, piece.slot: (rng.choice([e for e in SLOTS[piece.slot] if e["name"] not in taken]),)}
        text += piece.render(told[piece.slot][0])
    return text, told


# --- checking -----------------------------------------------------------------------------------------------------
def check_story(text: str) -> Verdict:
    """Parses a whole story. Rejects what the grammar would not tell: a wrong name, pronoun, thing, cause or ending."""
    text = text.strip()
    if not text:
        return Verdict(False, "the text is empty")
    parser = _Parser(text)
    if any(end == len(text) for end, _ in parser.parse(STORY, 0, {})):
        return Verdict(True, "")
    before, after = text[: parser.furthest][-40:], text[parser.furthest :][:40]
    return Verdict(False, f"after {before!r} the grammar does not go on with {after!r}")


def acceptance(texts: Iterable[str]) -> float:
    """The share, from 0 to 1, of the texts that the grammar accepts. Raises InputError when there is none."""
    verdicts = [check_story(text).ok for text in texts]
    if not verdicts:
        raise InputError("there is no story to check")
    return sum(verdicts) / len(verdicts)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.furthest = 0  # how far any branch came

    def parse(self, node: Node, start: int, slots: Slots) -> Iterator[tuple[int, Slots]]:
        """Every way to read `node` at `start`: where it ends, and what the slots can be after it."""
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
        taken = _settled_names({name: entries for name, entries in slots.items() if name != part.slot})
        for entry in slots.get(part.slot, SLOTS[part.slot]):
            text = part.render(entry)
            if entry["name"] not in taken and self.text.startswith(text, start):
                possible.setdefault(text, []).append(entry)
        for text, entries in possible.items():
            yield from self._parse_parts(rest, start + len(text), {**slots, part.slot: tuple(entries)})


def _settled_names(slots: Slots) -> set[str]:
    """Names that belong to a slot already: no two slots share one, so that the friend is never the hero."""
    return {entries[0]["name"] for entries in slots.values() if len({entry["name"] for entry in entries}) == 1}


@cache
def _parts(template: str) -> tuple[str | Mention, ...]:
    """A template's literal texts and mentions, in order."""
    parts: list[str | Mention] = []
    for literal, name, feature in re.findall(r"([^{}]+)|\{(\w+)(?:\.(\w+))?\}", template):
        parts.append(literal or Mention(name.lower(), feature or "name", name[0].isupper()))
    return tuple(parts)


# --- the command --------------------------------------------------------------------------------------------------
def read_stories(path: Path) -> list[str]:
    """The stories of a file: JSON lines with a "text" each, or paragraphs with blank or end-token lines between."""
    content = read_text(path)
    if content.lstrip().startswith("{"):
        try:
            texts = [json.loads(line)["text"] for line in content.splitlines() if line.strip()]
            if not all(isinstance(text, str) and is_unicode(text) for text in texts):
                raise ValueError("a text is none")
            return texts
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} does not hold one JSON object with a text per line: {error}") from None
    blocks = re.split(r"\n\s*\n|<\|endoftext\|>", content)
    return [" ".join(block.splitlines()).strip() for block in blocks if block.strip()]


def main() -> int:
    """Tells stories, or says how many of a file's the grammar accepts. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pastkey.train.stories", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="print the share of its stories that are accepted")
    parser.add_argument("--count", type=natural_int, default=1, help="stories to tell (default 1)")
    parser.add_argument("--seed", type=natural_int, default=0, help="other stories for another seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the figures")
    arguments = parser.parse_args()
    if arguments.check is None:
        for _, story in zip(range(arguments.count), stories(arguments.seed), strict=False):
            print(story + "\n")
        return 0
    try:
        texts = read_stories(arguments.check)
        share = acceptance(texts)
    except PastkeyError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print_json({"stories": len(texts), "accepted_share": share})
    else:
        print(f"the grammar accepts {share:.1%} of {len(texts)} stories")
        reasons = [verdict.reason for text in texts if not (verdict := check_story(text)).ok]
        for reason in reasons[:5]:
            print(f"  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
