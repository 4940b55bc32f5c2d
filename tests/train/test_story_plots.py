"""The words and plots: no gap that a story would show."""

from __future__ import annotations

from collections.abc import Iterator

from pastkey.train import story_plots
from pastkey.train.story_plots import CHARACTERS, SLOTS, STORY, TRAITS, Node


def strings(node: Node) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for part in node:
            yield from strings(part)


def test_entries_of_a_slot_have_the_same_features() -> None:
    assert SLOTS
    for slot, entries in SLOTS.items():
        assert len({frozenset(entry) for entry in entries}) == 1, slot
        assert all(all(text for text in entry.values()) for entry in entries), slot


def test_every_slot_that_a_plot_names_exists_with_that_feature() -> None:
    named = {
        place.partition("}")[0].lower() for text in strings(STORY) for place in text.split("{")[1:]
    }  # "hero", "hero.they"
    assert named
    for place in named:
        slot, _, feature = place.partition(".")
        assert slot in SLOTS, place
        assert (feature or "name") in SLOTS[slot][0], place


def test_a_character_is_told_by_one_name_and_kind() -> None:
    seen = {(entry["name"], entry["kind"]) for entry in CHARACTERS}
    assert len(seen) == len(CHARACTERS)
    assert {entry["they"] for entry in CHARACTERS} == {"she", "he"}
    assert len({entry["name"] for entry in TRAITS}) == len(TRAITS)


def test_crossed_tables_give_every_combination() -> None:
    rows = story_plots._crossed([{"a": "1"}, {"a": "2"}], [{"name": "x"}, {"name": "y"}])
    assert [(row["a"], row["name"]) for row in rows] == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y")]
