"""How many tokens are drafted: as many as pay, by what runs took, and never at a loss that shows."""

from __future__ import annotations

import random

import pytest

from pastkey.runtime.speculation.worth import Rate, Worth, observed

PER_TOKEN = 0.2  # of a step, for each further token of a run


class Text:
    """Decodes with made-up seconds, and counts them."""

    def __init__(self, worth: Worth, *, cost: float, prompt: int, seed: int, read: float = 0.1) -> None:
        self.worth, self.cost, self.read = worth, cost, read
        self.rate, self.behind, self.seconds = Rate(worth.rate), prompt + 1, prompt * read
        self.drafted = self.accepted = 0
        self.random = random.Random(seed)
        worth.note_prefill(self.seconds)

    def decode(self, new: int, acceptance: float) -> None:
        while new > 0:
            count = self.worth.tokens(self.rate.value, self.behind, new - 1)
            accepted = 0
            if count:
                runs = [(self.behind, self.cost * (1 + self.read * (self.behind - 1))), *[(1, self.cost)] * (count - 1)]
                self.worth.note_drafting(runs)
                self.seconds += sum(seconds for _, seconds in runs)
                while accepted < count and self.random.random() < acceptance:
                    accepted += 1
                self.behind = 1
            step = 1 + PER_TOKEN * count
            self.seconds += step
            self.worth.note_step(count + 1, step)
            if count:
                self.worth.note_draft(count, accepted)
                for place in range(observed(count, accepted)):
                    self.rate.note(place < accepted)
            self.drafted, self.accepted = self.drafted + count, self.accepted + accepted
            self.behind += accepted + 1 if not count else 1
            new -= accepted + 1


def speed(texts: int, new: int, acceptance: float, *, cost: float, prompt: int = 10, guess: float = 1.0) -> float:
    """Of several texts with a draft model against the same without. `guess`: how its cost is misjudged at first."""
    worth, spent = Worth(cost * guess, 0.1 * cost * guess), 0.0
    for seed in range(texts):
        text = Text(worth, cost=cost, prompt=prompt, seed=seed)
        text.decode(new, acceptance)
        spent += text.seconds
    return texts * (new + 0.1 * prompt) / spent


@pytest.mark.parametrize(
    ("cost", "guess", "prompt", "new", "acceptance"),
    [(0.05, 3.0, 10, 300, 0.0), (0.6, 0.7, 1, 16, 0.1), (0.2, 1.0, 500, 64, 0.1), (1.5, 0.7, 500, 300, 0.0)],
)
def test_a_useless_draft_model_costs_little(cost, guess, prompt, new, acceptance):
    assert speed(4, new, acceptance, cost=cost, prompt=prompt, guess=guess) >= 0.97


def test_a_good_one_is_used():
    assert speed(8, 128, 0.8, cost=0.1) > 1.4
    assert speed(8, 128, 0.8, cost=0.1, prompt=300) > 1.2


def test_no_drafts_before_two_timed_steps_nor_at_the_end():
    worth = Worth(0.1, 0.01)
    assert worth.tokens(0.9, 1, 100) == 0
    worth.note_step(4, 1.0)
    worth.note_step(1, 1.0)
    assert worth.tokens(0.9, 1, 100) == 0
    worth.note_step(1, 1.0)
    assert worth.tokens(0.9, 1, 100) > 0
    assert worth.tokens(0.9, 1, 0) == 0
    assert worth.tokens(0.9, 1, 1) <= 1


def test_a_text_begins_with_the_rate_of_others_and_finds_its_own():
    rate = Rate(0.9)
    assert rate.value == pytest.approx(0.9)
    for _ in range(6):
        rate.note(False)
    assert rate.value < 0.4
    assert [observed(3, accepted) for accepted in range(4)] == [1, 2, 3, 3]  # up to the first rejected token
    assert observed(0, 0) == 1  # it said that nothing follows
