from __future__ import annotations

import pytest

from pastkey.precisions import PRECISIONS


def test_no_two_precisions_have_one_file_or_one_name_in_transformers_js():
    for column in ("graph", "transformers_js", "bits"):
        assert len({getattr(row, column) for row in PRECISIONS.values()}) == len(PRECISIONS), column


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_quantized_precision_has_bounds_and_a_finer_one(name):
    row = PRECISIONS[name]
    assert row.name == name
    assert row.quantized == (row.max_kl > 0) == (row.decode_kl > 0) == (row.calibration_windows > 0)
    assert not row.quantized or PRECISIONS[row.finer].bits > row.bits
