"""The origin of a draft, and the tokens that a step with other rows would have given."""

from __future__ import annotations

from collections.abc import Sequence

from pastkey.runtime.speculation.drafter import Drafter
from pastkey.runtime.speculation.speculator import Speculator

TEXT = [1, 2, 3, 4, 5, 6, 1, 2, 3]  # 4, 5 by the tokens that followed before


class Nines(Drafter):
    """Drafts nines, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(lambda ids, most: 1 / 0, print)  # type: ignore[arg-type, return-value]
        self.told: list[tuple[int, int]] = []
        self.stopped = False

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        self.made = True
        return [9] * min(2, most)

    def record(self, drafted: int, accepted: int) -> None:
        self.told.append((drafted, accepted))

    def stop(self) -> None:
        self.stopped = True


def test_prompt_lookup_comes_before_the_draft_model():
    drafter, text = Nines(), list(TEXT)
    speculator = Speculator(prompt_lookup=True, drafter=drafter, constraint=None)
    assert speculator.draft(text, 9) == [4]
    speculator.end(1, 1)
    assert speculator.draft(text, 9) == [4, 5]
    speculator.end(2, 0)
    text += [7]
    assert speculator.draft(text, 9) == [9, 9]
    speculator.end(2, 0)  # which is no rejection of the text's tokens
    text += [8, 1, 2, 3]
    assert speculator.draft(text, 9) == [7]
    speculator.end(1, 0)
    text += [6, 0, 1, 2, 3]
    assert speculator.draft(text, 9) == [9, 9]  # after two of those, more must agree
    assert drafter.told == [(2, 0)]


def test_without_either_and_after_the_end_there_is_no_draft():
    neither = Speculator(prompt_lookup=False, drafter=None, constraint=None)
    for speculator in (neither, Speculator(prompt_lookup=True, drafter=None, constraint=None)):
        speculator.end(0, 0)
        speculator.guess(TEXT, 9)
        assert speculator.came(4, more=True) == (1 if speculator is neither else 2)  # forced tokens end a guess
        speculator.stop()
        assert speculator.draft(TEXT, 9) == []
    drafter = Nines()
    Speculator(prompt_lookup=True, drafter=drafter, constraint=None).stop()
    assert drafter.stopped
