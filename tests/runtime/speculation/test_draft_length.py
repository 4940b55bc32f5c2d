"""The length of the next draft, by the results of those before."""

from __future__ import annotations

from pastkey.runtime.speculation.draft_length import DraftLength


def test_drafts_grow_while_they_are_accepted_whole():
    length, lengths = DraftLength(), list[int]()
    for accepted in (1, 3, 7, 6, 0, 1, 3):
        lengths.append(length.most)
        length.record(length.most, accepted)
    assert lengths == [1, 3, 7, 7, 1, 1, 3]


def test_a_shortened_draft_does_not_change_the_length():
    length = DraftLength()
    for drafted in (1, 2):  # of three: a constraint, or the end of the text
        length.record(drafted, drafted)
    assert length.most == 3
    length.record(0, 0)  # the draft model said that the text ends
    assert (length.most, length.rejections) == (3, 1)
