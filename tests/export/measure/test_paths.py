"""How the compared text is run: in parts at both ends, and the tokens between them at once."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.export.measure.paths import (
    PIECE_TOKENS,
    RANDOM_TOKENS,
    SHORT_DECODE,
    SHORT_PREFILL,
    TOKENS,
    Plan,
    VerificationProgress,
    at_ends,
    run_last_logits,
    short_texts,
    sizes_of_runs,
)
from pastkey.export.progress import SILENT
from pastkey.runtime import Engine


@pytest.mark.parametrize(
    ("length", "size", "ends", "sizes"),
    [
        (150, 7, 4, [7] * 4 + [94] + [7] * 4),
        (150, 64, 1, [50, 50, 50]),
        (1040, 64, 1, [64, 912, 64]),
        (60, 1, 24, [1] * 24 + [12] + [1] * 24),
        (11, 1, 24, [1] * 11),
        (11, 7, 4, [6, 5]),
        (1, 64, 1, [1]),
    ],
)
def test_a_text_is_run_in_parts_at_both_ends(length, size, ends, sizes):
    assert sizes_of_runs(length, size, ends) == sizes


@pytest.mark.parametrize("length", [1, 2, 40, TOKENS, 1040])
def test_each_path_takes_every_token_once(length):
    for plan in (Plan.of(length), Plan.short(length)):
        for sizes in (*plan.paths.values(), plan.decoded_by_all_logits):
            assert sum(sizes) == length
            assert min(sizes) >= 1
    assert len(Plan.of(length).paths["decode"]) <= 49


def test_the_run_between_the_ends_is_told_from_them():
    plan = Plan.of(TOKENS)
    ends = {name: int(at_ends(sizes).sum()) for name, sizes in plan.paths.items()}
    assert ends == {"prefill": 1, "decode": 48, "chunks_of_7": 16, "chunks_of_64": 3}
    assert at_ends([6, 5]).all()


def test_a_quick_proof_decodes_the_end_of_a_short_text(exported):
    bundle = exported("llama").bundle
    texts = short_texts(Engine(bundle), 2)
    assert [text.size for text in texts] == [bundle.manifest.context_length] * 2
    assert not np.array_equal(texts[0], texts[1])
    decode = Plan.short(SHORT_PREFILL + SHORT_DECODE).paths["decode"]
    assert decode == [SHORT_PREFILL] + [1] * SHORT_DECODE
    plan = Plan.short(texts[0].size)
    found = run_last_logits(bundle, plan, texts[0], None, VerificationProgress(SILENT, plan), {})
    assert found.ids is texts[0]
    assert {name: len(logits) for name, logits in found.paths.items()} == {
        name: len(sizes) for name, sizes in plan.paths.items()
    }


def test_the_text_is_written_in_pieces_side_by_side(exported, monkeypatch):
    runs = list[tuple[int, ...]]()
    forward = Engine.forward

    def counted(engine: Engine, ids: np.ndarray) -> np.ndarray:
        runs.append(ids.shape)
        return forward(engine, ids)

    monkeypatch.setattr(Engine, "forward", counted)
    bundle = exported("llama").bundle
    plan = Plan.of(bundle.manifest.context_length)
    found = run_last_logits(bundle, plan, None, None, VerificationProgress(SILENT, plan), {})
    assert found.ids.shape == (40,)
    assert runs[0] == (1, RANDOM_TOKENS)
    assert len(runs) <= PIECE_TOKENS
    again = run_last_logits(bundle, plan, None, None, VerificationProgress(SILENT, plan), {})
    np.testing.assert_array_equal(found.ids, again.ids)
