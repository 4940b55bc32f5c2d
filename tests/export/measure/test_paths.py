"""How the compared text is run: in parts at both ends, and the tokens between them at once."""

from __future__ import annotations

import numpy as np
import pytest

from pastkey.export.measure import paths
from pastkey.export.measure.paths import SHORT_DECODE, SHORT_PREFILL, TOKENS, Plan
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
    assert paths.sizes_of_runs(length, size, ends) == sizes


@pytest.mark.parametrize("length", [1, 2, 40, TOKENS, 1040])
def test_each_path_takes_every_token_once(length):
    for plan in (Plan.of(length), Plan.short(length)):
        for sizes in (*plan.paths.values(), plan.decoded_by_all_logits):
            assert sum(sizes) == length
            assert min(sizes) >= 1
    assert len(Plan.of(length).paths["decode"]) <= 49


def test_the_run_between_the_ends_is_told_from_them():
    plan = Plan.of(TOKENS)
    ends = {name: int(paths.at_ends(sizes).sum()) for name, sizes in plan.paths.items()}
    assert ends == {"prefill": 1, "decode": 48, "chunks_of_7": 16, "chunks_of_64": 3}
    assert paths.at_ends([6, 5]).all()


def last_logits(bundle, plan, ids=None):
    return paths.run_last_logits(bundle, plan, ids, None, paths.VerificationProgress(SILENT, plan), {})


def test_a_quick_proof_decodes_the_end_of_a_short_text(exported):
    bundle = exported("llama").bundle
    texts = paths.short_texts(Engine(bundle), 2)
    assert [text.size for text in texts] == [bundle.manifest.context_length] * 2
    assert not np.array_equal(texts[0], texts[1])
    decode = Plan.short(SHORT_PREFILL + SHORT_DECODE).paths["decode"]
    assert decode == [SHORT_PREFILL] + [1] * SHORT_DECODE
    plan = Plan.short(texts[0].size)
    found = last_logits(bundle, plan, texts[0])
    assert found.ids is texts[0]
    expected = {name: len(sizes) for name, sizes in plan.paths.items()}
    assert {name: len(rows) for name, rows in found.paths.items()} == expected


def test_the_text_is_written_in_pieces_side_by_side(exported, monkeypatch):
    runs, forward = list[tuple[int, ...]](), Engine.forward

    def counted(engine, ids):
        runs.append(ids.shape)
        return forward(engine, ids)

    monkeypatch.setattr(Engine, "forward", counted)
    bundle = exported("llama").bundle
    plan = Plan.of(bundle.manifest.context_length)
    found = last_logits(bundle, plan)
    assert found.ids.shape == (40,)
    assert runs[0] == (1, paths.RANDOM_TOKENS)
    assert len(runs) <= paths.PIECE_TOKENS
    np.testing.assert_array_equal(found.ids, last_logits(bundle, plan).ids)
