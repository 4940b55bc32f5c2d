"""The grammar of `stories`: words with their features, and plots over them.

A string is text; `{hero}` is the slot's name, `{hero.they}` another of its features, `{Hero.they}` for the
same with a capital. A tuple is a sequence; a list is a choice. A slot keeps its entry, which makes words agree: a
character called Mia is a girl or a fox throughout, and the thing that was lost is the thing that is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Final

Entry = Mapping[str, str]  # feature -> text; "name" identifies the entry
Node = str | tuple["Node", ...] | list["Node"]


def _table(features: str, *rows: str) -> tuple[Entry, ...]:
    """Returns entries from rows of texts separated by `|`, in the order of `features`."""
    keys = features.split()
    entries = []
    for row in rows:
        texts = [text.strip() for text in row.split("|")]
        assert len(texts) == len(keys), f"{len(texts)} texts for {len(keys)} features: {row}"
        entries.append(dict(zip(keys, texts, strict=True)))
    return tuple(entries)


def _names(words: str) -> tuple[Entry, ...]:
    return tuple({"name": word} for word in words.split())


def _crossed(*tables: Iterable[Entry]) -> tuple[Entry, ...]:
    """Returns every combination of the tables' entries; the last table's name is the name."""
    return tuple({key: text for entry in row for key, text in entry.items()} for row in product(*tables))


# --- words --------------------------------------------------------------------------------------------------------
_ANIMALS = _table("kind", "fox", "rabbit", "bear", "mouse", "duck", "hedgehog")
_SHE = {"they": "she", "them": "her", "their": "her"}
_HE = {"they": "he", "them": "him", "their": "his"}
HEROES: Final = (
    *_crossed([_SHE], [{"kind": "girl"}, *_ANIMALS], _names("Mia Lily Anna Ella Nora Ruby")),
    *_crossed([_HE], [{"kind": "boy"}, *_ANIMALS], _names("Tom Ben Max Leo Sam Finn")),
)
FRIENDS: Final = _crossed(_ANIMALS, _names("Zoe Lucy Emma Clara Jack Noah Oscar Hugo"))

HOMES: Final = _names("sea forest river mountains village")
FAMILY: Final = _table("name", "mother", "father", "grandmother", "grandfather", "aunt", "uncle")
COLORS: Final = _names("red blue green yellow white")
TREASURES: Final = _names("ball kite scarf key drum ring lantern")

# A hiding place belongs to a place. `name` is the hiding place, since a place is named once and searched later.
SPOTS: Final = _table(
    "place name",
    "the park | under the slide",
    "the park | behind the bench",
    "the beach | between two shells",
    "the beach | beside the old boat",
    "the forest | under a log",
    "the forest | in a hollow tree",
    "the farm | in the hay",
    "the farm | beside the well",
)

FOODS: Final = _table("name", "bread", "apples", "cherries", "cookies", "cheese", "nuts")

TROUBLES: Final = _table(
    "name tool result",
    "it began to rain | a big umbrella | dry",
    "it began to snow | a woolen blanket | warm",
    "it grew dark | a bright lamp | safe",
)

PROJECTS: Final = _table(
    "name fault piece success",
    "a kite | it would not fly | a long ribbon | rose high above the trees",
    "a raft | it had a hole | a lump of wax | floated across the pond",
    "a swing | it hung too low | a second rope | went up and down all day",
    "a cart | it would not roll | four round lids | rolled down the lane",
)

RESCUES: Final = _table(
    "name stuck tool freed thanks",
    "bird | caught in a thorn bush | a pair of scissors | cut the thorns away | sang a sweet song",
    "kitten | stuck on a high branch | a long ladder | climbed up to it | purred softly",
    "turtle | lying on its back | a strong stick | turned it over | nodded slowly",
    "bee | floating in a puddle | a dry leaf | lifted it out | danced in the air",
)

SLOTS: Final[Mapping[str, tuple[Entry, ...]]] = {
    "hero": HEROES,
    "friend": FRIENDS,
    "home": HOMES,
    "elder": FAMILY,
    "color": COLORS,
    "treasure": TREASURES,
    "spot": SPOTS,
    "food": FOODS,
    "trouble": TROUBLES,
    "project": PROJECTS,
    "rescue": RESCUES,
}

# --- plots --------------------------------------------------------------------------------------------------------
_OPENING: Node = [
    "Once upon a time a {hero.kind} named {hero} lived near the {home}.",
    "There once was a {hero.kind} named {hero} who lived by the {home}.",
    "{Hero} was a little {hero.kind}.",
]

_FRIEND_COMES: Node = [
    "Then {friend}, a {friend.kind}, came by.",
    "Just then {hero.they} met {friend}, a {friend.kind}.",
]

# No ending is the beginning of another, so that a truncated story is never a story.
_ENDING: Node = [
    "{Hero} and {friend} stayed good friends ever after.",
    "That night {hero} slept well.",
    "And {hero} never forgot that day.",
]

_LOST: Node = (
    ["{Hero} loved the {color} {treasure} that {hero.their} {elder} had made.", "{Hero} had a {color} {treasure}."],
    ["One day {hero.they} took it to {spot.place} and lost it.", "One day {hero.they} lost it in {spot.place}."],
    ["{Hero} sat down and cried.", ""],
    _FRIEND_COMES,
    ['"Let us look together," said {friend}.', '"Do not worry, {hero}," said {friend}.'],
    ["They found the {color} {treasure} {spot}.", "{Friend} found the {treasure} {spot}."],
    ['"Thank you, {friend}!" said {hero}.', ""],
)

_SHARED: Node = (
    ["One day {hero.their} {elder} gave {hero.them} some {food}.", "One day {hero} had some {food}."],
    _FRIEND_COMES,
    ['"I am so hungry," said {friend}.', "{Friend} was hungry."],
    ["{Hero} gave {friend} half of the {food}.", "So {hero} shared the {food}."],
    ["Later {trouble}.", "On the way home {trouble}."],
    ["But {friend} had {trouble.tool}.", '"I have {trouble.tool}," said {friend}.'],
    ["So they both stayed {trouble.result}."],
)

_BUILT: Node = (
    ["One day {hero} built {project}.", "{Hero} wanted to build {project}."],
    ["But {project.fault}."],
    ['"What a pity," said {hero}.', ""],
    _FRIEND_COMES,
    ["{Friend} ran home and brought {project.piece}.", '"I have {project.piece}," said {friend}.'],
    ["Then it {project.success}.", "They worked together until it {project.success}."],
    ['"We did it!" said {hero}.', ""],
)

_RESCUED: Node = (
    ["One day {hero} saw a {rescue} {rescue.stuck}.", "{Hero} heard a {rescue}. It was {rescue.stuck}."],
    ['"Please help me," said the {rescue}.', ""],
    _FRIEND_COMES,
    ["{Friend} brought {rescue.tool}.", '"I will bring {rescue.tool}," said {friend}.'],
    ["With it {hero} {rescue.freed}.", "{Hero} {rescue.freed}."],
    ["The {rescue} {rescue.thanks}."],
)

STORY: Final[Node] = (_OPENING, [_LOST, _SHARED, _BUILT, _RESCUED], _ENDING)
