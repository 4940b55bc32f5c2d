"""Prompt-lookup decoding: drafts the tokens that followed the last occurrence of the newest tokens.

Decoding is bound by reading the weights: running four tokens at once costs 1.4 steps, and eight 1.8 (SmolLM2-135M int8,
with the native kernels and with onnxruntime's). A draft token is accepted only if the sampler chooses it. Several
tokens take another attention kernel path than one, which differs in the last bits. In float32 the output is the same.
int8 amplifies the difference, so outputs may diverge where two tokens are nearly equally likely, and sampled ones
sooner or later do. Names, phrases and code repeat often enough; if they do not, drafts are short and become rare as
they are rejected.

Prompt lookup decoding, A. Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence

from ..settings import MAX_DRAFT_TOKENS

_SHORTEST, _LONGEST = 2, 8  # consecutive tokens that must match for a draft: at first, and at most after rejections
_PLACES = 16  # number of earlier occurrences of the last two tokens to compare, the latest first


class PromptLookup:
    """Drafts for one request, whose ids only grow."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], list[int]] = {}  # two tokens -> the positions after them, in order
        self._indexed = 0
        self._needed = _SHORTEST
        self._most = 1

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
        if length < self._needed:
            return []
        most = min(most, self._most, length - 1)  # short matches are accepted less often
        found = list(ids[best : best + most])
        while len(found) < most:  # the match overlaps the end: it repeats
            found.append(found[len(found) - (len(ids) - best)])
        return found

    def record(self, drafted: int, accepted: int) -> None:
        """Records the accepted tokens of the last draft. Draft lengths grow 1, 3, 7 while all are accepted, else 1."""
        self._needed = _SHORTEST if accepted else min(self._needed + 1, _LONGEST)
        if accepted < drafted:
            self._most = 1
        elif drafted == self._most:
            self._most = min(2 * drafted + 1, MAX_DRAFT_TOKENS)
