"""Matrices of a quantized file are found by their numbers, and their blocks have these numbers bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is not installed")

from pastkey.export.graph.blocks import Blocks, Numbers, packed
from pastkey.export.quantize.rounding.kept import SourceFile
from pastkey.export.source.packed.gguf import GgufMatrix

from ...source.packed.gguf_blocks import PLACES, random_rows, weights_of

ROWS, COLUMNS = 130, 512
KEPT = sorted(set(PLACES) - {"Q2_K"})


def found(raw: np.ndarray, kind: str, weights: np.ndarray) -> Blocks | None:
    answer = SourceFile([GgufMatrix(kind, raw)]).find(weights)
    return None if answer is None else answer.blocks


@pytest.mark.parametrize("kind", KEPT)
def test_the_blocks_of_each_type_are_the_numbers_of_the_gguf_library_in_any_order_of_rows(kind):
    raw = random_rows(kind, ROWS, COLUMNS)
    weights = weights_of(raw, kind)[np.random.default_rng(1).permutation(ROWS)]
    blocks = found(raw, kind, weights)
    assert blocks is not None
    np.testing.assert_array_equal(blocks.matrix, weights)
    stored = blocks.data.nbytes + blocks.scales.factors.nbytes
    stored += 0 if blocks.scales.codes is None else blocks.scales.codes.nbytes
    if blocks.offsets is not None:
        stored += blocks.offsets.factors.nbytes + (0 if blocks.offsets.codes is None else blocks.offsets.codes.nbytes)
    in_file = 8 * raw.nbytes / weights.size
    # Bits of a weight: as in the file, but that 5 and 6 bits need 8, 3 need 4, and factors of codes are float32.
    assert 8 * stored / weights.size <= in_file + {"Q3_K": 1.3, "Q5_0": 3, "Q5_1": 3, "Q5_K": 3.3, "Q6_K": 2.1}.get(
        kind, 0.3
    )


def test_a_table_with_equal_rows_and_matrices_that_were_joined_are_found():
    one, two = random_rows("Q6_K", 40, COLUMNS, 1), random_rows("Q6_K", 24, COLUMNS, 2)
    one[7] = one[3]
    file = SourceFile([GgufMatrix("Q6_K", one), GgufMatrix("Q6_K", two)])
    joined = np.concatenate([weights_of(two, "Q6_K"), weights_of(one, "Q6_K")])
    answer = file.find(joined)
    assert answer is not None
    assert answer.blocks is not None
    assert answer.form == "Q6_K"
    np.testing.assert_array_equal(answer.blocks.matrix, joined)


def test_rows_that_several_matrices_have_belong_to_the_one_that_has_all_rows():
    one, two = random_rows("Q8_0", 40, COLUMNS, 1), random_rows("Q4_0", 40, COLUMNS, 2)
    one[30:] = 0  # unused tokens: zeros in both
    two[30:] = 0
    two.reshape(40, -1, 18)[30:, :, 2:] = 0x88
    file = SourceFile([GgufMatrix("Q8_0", one), GgufMatrix("Q4_0", two)])
    for raw, kind in ((one, "Q8_0"), (two, "Q4_0")):
        answer = file.find(weights_of(raw, kind))
        assert answer is not None
        assert answer.blocks is not None
        assert answer.form == kind


def test_what_is_not_in_the_file_or_cannot_be_kept_is_not():
    raw, other = random_rows("Q4_K", 8, COLUMNS), random_rows("Q6_K", 8, COLUMNS)
    weights, rest = weights_of(raw, "Q4_K"), weights_of(other, "Q6_K")
    file = SourceFile([GgufMatrix("Q4_K", raw), GgufMatrix("Q6_K", other)])
    changed = weights.copy()
    changed[5, 100] = np.nextafter(changed[5, 100], np.float32(1))
    assert file.find(changed) is None
    both = file.find(np.concatenate([weights, rest]))  # of two forms
    assert both is not None
    assert (both.form, both.blocks) == ("Q4_K+Q6_K", None)
    few = random_rows("Q2_K", 8, COLUMNS)
    answer = SourceFile([GgufMatrix("Q2_K", few)]).find(weights_of(few, "Q2_K"))
    assert answer is not None
    assert (answer.form, answer.blocks) == ("Q2_K", None)


def swapped(blocks: Blocks) -> Blocks:
    return replace(blocks, make=lambda data=blocks.data: data >> 4 | data << 4)


def of_numbers(what: str, change: Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]) -> Callable[[Blocks], Blocks]:
    def faulty(blocks: Blocks) -> Blocks:
        numbers = getattr(blocks, what)
        return replace(blocks, **{what: Numbers(*change(numbers.factors, numbers.codes))})

    return faulty


FAULTS = {
    "swapped nibbles": swapped,
    "a shifted group": of_numbers("scales", lambda factors, codes: (factors, np.roll(codes, 1, 1))),
    "a scale": of_numbers("scales", lambda factors, codes: (factors * np.float32(1.0000001), codes)),
    "an offset that is off by one": of_numbers("offsets", lambda factors, codes: (factors, codes + 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_reading_of_codes_is_found(fault, monkeypatch):
    raw = random_rows("Q4_K", 8, COLUMNS)
    assert found(raw, "Q4_K", weights_of(raw, "Q4_K")) is not None
    right = GgufMatrix.blocks

    def faulty(self, rows):
        blocks = right(self, rows)
        return blocks and FAULTS[fault](blocks)

    monkeypatch.setattr(GgufMatrix, "blocks", faulty)
    assert found(raw, "Q4_K", weights_of(raw, "Q4_K")) is None


def test_blocks_with_zero_points_and_another_order_of_channels():
    rng = np.random.default_rng(0)
    order = rng.permutation(64)
    codes, zeros = rng.integers(0, 16, (8, 64), np.uint8), rng.integers(0, 16, (8, 2), np.uint8)
    scales = rng.uniform(0.5, 1, (8, 2)).astype(np.float16)
    in_order = (codes - np.repeat(zeros, 32, 1).astype(np.float32)) * np.repeat(scales, 32, 1)
    weights = np.empty_like(in_order)
    weights[:, order] = in_order

    class Shuffled:
        form, shape = "GPTQ", (8, 64)

        def weights(self, rows):
            return weights[rows]

        def blocks(self, rows):
            data = packed(codes[rows]).reshape(len(rows), 2, 16)
            return Blocks(lambda: data, Numbers(scales[rows]), 64, 32, packed(zeros[rows]), 4, order=order)

    answer = SourceFile([Shuffled()]).find(weights[::-1])
    assert answer is not None
    assert answer.blocks is not None
    np.testing.assert_array_equal(answer.blocks.matrix, in_order[::-1])
    assert replace(answer.blocks, order=None).form != answer.blocks.form  # never merged with another order
