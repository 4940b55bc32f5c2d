from __future__ import annotations

from dataclasses import dataclass

from pastkey.runtime.decoding.batching.pace import Pace


@dataclass
class Row:
    tokens_per_step: float


def test_single_steps_pay_where_drafts_bring_more_than_a_batch():
    pace = Pace()
    assert not pace.turns_pay([Row(4), Row(4)])  # nothing was timed
    pace.note(2, 0.010)
    assert not pace.turns_pay([Row(4), Row(4)])
    pace.note(1, 0.009)
    assert pace.turns_pay([Row(3.5), Row(3.5)])
    assert not pace.turns_pay([Row(1), Row(1)])
    assert not pace.turns_pay([Row(3.5), Row(1)])
    pace.note(8, 0.015)
    assert not pace.turns_pay([Row(4)] * 8)
