"""Prompt-lookup decoding: draft tokens from the text itself, what followed the last time that it said the same.

A step of decoding is bound by reading the weights, so that running four tokens at once costs less than two steps, and
eight a little more. A draft token is accepted only where the sampler chooses it. Several tokens take another path
through attention than one, which differs in the last bits: in float32 the text is the same; int8 amplifies them, so
that two texts may part where two tokens are nearly as likely, and drawn ones sooner or later do. Texts repeat names,
phrases and code often enough; where one does not, drafts are short, and become rare as they are rejected.

Prompt lookup decoding, A. Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence

from ..settings import MAX_DRAFT_TOKENS

_SHORTEST, _LONGEST = 2, 8  # tokens in a row that must agree for a draft: at first, and at most after rejected ones
_PLACES = 16  # where the last two tokens stood before, at most, that are looked at, the latest first


class PromptLookup:
    """Drafts for one text, which only grows."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], list[int]] = {}  # two tokens -> the places behind them, in order
        self._indexed = 0
        self._needed = _SHORTEST
        self._most = 1

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`, the text so far; none where it says nothing about them."""
        for place in range(max(2, self._indexed), len(ids)):  # the end itself is indexed once something follows it
            self._after.setdefault((ids[place - 2], ids[place - 1]), []).append(place)
        self._indexed = len(ids)
        if most < 1 or len(ids) < _SHORTEST:
            return []
        best, length = 0, 0
        for place in reversed(self._after.get((ids[-2], ids[-1]), ())[-_PLACES:]):
            agreeing = 2
            while agreeing < min(place, _LONGEST) and ids[place - agreeing - 1] == ids[-agreeing - 1]:
                agreeing += 1
            if agreeing > length:
                best, length = place, agreeing
        if length < self._needed:
            return []
        most = min(most, self._most, length - 1)  # what agrees in two tokens only is accepted less often
        found = list(ids[best : best + most])
        while len(found) < most:  # the text repeats itself without a break
            found.append(found[len(found) - (len(ids) - best)])
        return found

    def record(self, drafted: int, accepted: int) -> None:
        """Takes in how many tokens of the last draft were accepted: 1, 3 and 7 are drafted where all were, then 1."""
        self._needed = _SHORTEST if accepted else min(self._needed + 1, _LONGEST)
        if accepted < drafted:
            self._most = 1
        elif drafted == self._most:
            self._most = min(2 * drafted + 1, MAX_DRAFT_TOKENS)
