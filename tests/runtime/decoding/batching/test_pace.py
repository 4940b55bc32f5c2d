from __future__ import annotations

from pastkey.runtime.decoding.batching.pace import Pace


def test_single_steps_pay_where_drafts_bring_more_than_a_batch():
    pace = Pace()
    assert not pace.turns_pay([4, 4])  # nothing was timed
    pace.note(2, 0.010)
    assert not pace.turns_pay([4, 4])
    pace.note(1, 0.009)
    assert pace.turns_pay([3.5, 3.5])
    assert not pace.turns_pay([1, 1])
    assert not pace.turns_pay([3.5, 1])
    pace.note(8, 0.015)
    assert not pace.turns_pay([4] * 8)
