"""The words and plots: no gap that a story would show."""

from __future__ import annotations

from pastkey.train.story_plots import CHARACTERS, SLOTS, TRAITS


def test_entries_of_a_slot_have_the_same_features():
    assert SLOTS
    for slot, entries in SLOTS.items():
        assert len({frozenset(entry) for entry in entries}) == 1, slot
        assert all(all(text for text in entry.values()) for entry in entries), slot


def test_a_character_is_told_by_one_name_and_kind():
    seen = {(entry["name"], entry["kind"]) for entry in CHARACTERS}
    assert len(seen) == len(CHARACTERS)
    assert {entry["they"] for entry in CHARACTERS} == {"she", "he"}
    assert len({entry["name"] for entry in TRAITS}) == len(TRAITS)
