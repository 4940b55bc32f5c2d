"""Prompt-lookup decoding: drafts the tokens that followed the last occurrence of the newest tokens.

A draft token is accepted only if the sampler chooses it. Several tokens have another attention kernel path than one,
which differs in the last bits. In float32 the output is the same. int8 amplifies the difference, so outputs may diverge
where two tokens are nearly equally likely, and sampled ones sooner or later do. Names, phrases and code repeat often
enough; if they do not, drafts are short and become rare as they are rejected.

Prompt lookup decoding, A. Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence

from .draft_length import DraftLength

_SHORTEST, _LONGEST = 2, 8  # consecutive tokens that must match for a draft: at first, and at most after rejections
_PLACES = 16  # number of earlier occurrences of the last two tokens to compare, the latest first


class PromptLookup:
    """Drafts for one request, whose ids only grow."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], list[int]] = {}  # two tokens -> the positions after them, in order
        self._indexed = 0
        self._length = DraftLength()

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`; none without a match."""
        for place in range(max(2, self._indexed), len(ids)):  # the last two tokens are indexed once another follows
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
        if length < min(_SHORTEST + self._length.rejections, _LONGEST):
            return []
        most = min(most, self._length.most, length - 1)  # short matches are accepted less often
        found = list(ids[best : best + most])
        while len(found) < most:  # the match overlaps the end: it repeats
            found.append(found[len(found) - (len(ids) - best)])
        return found

    def record(self, drafted: int, accepted: int) -> None:
        """Records the accepted tokens of the last draft."""
        self._length.record(drafted, accepted)
