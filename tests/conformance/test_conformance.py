"""Every bundle of the table behaves as its source does, whatever its graph, its weights and the kernels that run it.

The reference is the uncached run in torch. A behaviour that does not apply to a row has its reason in the table.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pastkey.contract import names
from pastkey.errors import InputError, IntegrityError, NumericsError
from pastkey.export.generation.loop import why_no_step
from pastkey.export.generation.write import settings as as_feeds
from pastkey.export.measure.hidden_states import head_input
from pastkey.runtime import Engine, Generation, Request, SamplingConfig
from pastkey.runtime.engine import golden
from pastkey.runtime.engine.caches.slab import Slab

from ..export.plain_loop import Text, open_graph
from ..shared import divided
from .bundles import CI, QUICK, ROWS, hybrid


def rows(behaviour: str, applies: Any = lambda row: True) -> Any:
    """The rows that a behaviour applies to, as the parameter `this`."""
    found = [name for name, row in ROWS.items() if behaviour not in row.lacks and applies(row)]
    some = {name: [*{*found} & {*part}] for name, part in (("quick", QUICK), ("ci", CI))}
    return pytest.mark.parametrize("this", divided(found, **some), indirect=True)


def exported_with(option: str) -> Any:
    return lambda row: row.options.get(option)


# --- one sequence -------------------------------------------------------------------------------------------------
@rows("prefill")
def test_one_run_equals_the_source(this):
    ids = this.ids(this.row.context)
    expected = this.of_source(ids)
    for engine in this.engines():
        off = np.abs(engine.all_logits(ids) - expected).max() / np.abs(expected).max()
        assert off <= this.row.limits[0]


@rows("steps")
def test_decode_token_by_token_equals_prefill(this):
    ids = this.ids(this.row.context)
    for engine in this.engines():
        this.require_close(np.stack([engine.decode(token) for token in ids]), this.expected(ids))


@rows("chunks")
def test_chunks_equal_one_run(this):
    ids = this.ids(this.row.context)
    expected = this.expected(ids)
    for engine in this.engines():
        for sizes in ([7, 1, 2, 30], [1, 20, 19], [39, 1]):
            engine.reset()
            ends = np.cumsum(sizes)
            parts = np.split(np.array(ids[: ends[-1]]), ends[:-1])
            this.require_close(np.stack([engine.prefill(part) for part in parts]), expected[ends - 1])


@rows("trim")
def test_decode_after_trim_equals_fresh_prefill(this):
    first, second = this.ids(20, seed=1), this.ids(12, seed=2)
    expected = this.expected(first[:9] + second)[9:]
    for engine in this.engines():
        engine.prefill(first)
        engine.trim(9)
        this.require_close(np.stack([engine.decode(token) for token in second]), expected)


@rows("cut")
def test_a_rejected_draft_costs_the_run_that_it_was_in_at_most(this):
    """After `cut`, it continues as a fresh text; a cache that trims no tokens still has those before the last run."""
    ids, more = this.ids(20), this.ids(4, seed=1)
    for engine in this.engines():
        engine.prefill(ids)
        engine.append(more)
        engine.cut(22)
        assert engine.length in ((0,) if engine.manifest.rows else (20, 22))
        text = [*ids, *more[:2], 5]
        this.require_close(engine.prefill(text[engine.length :]), this.expected(text)[-1])


@rows("refused_run", lambda row: row.build is hybrid)
def test_a_run_whose_logits_are_refused_leaves_the_states(this, monkeypatch):
    """It has written over the copy before the last run."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NumericsError("not finite")

    ids, engine = this.ids(20), this.engine()
    engine.prefill(ids)
    engine.append(ids[:3])
    with monkeypatch.context() as patch:
        patch.setattr(engine.graph, "check_finite", refuse)
        with pytest.raises(NumericsError):
            engine.append(ids[:2])
    this.require_close(engine.copy().decode(7), this.expected([*ids, *ids[:3], 7])[-1])
    engine.cut(20)
    this.require_close(engine.prefill([*ids, 7][engine.length :]), this.expected([*ids, 7])[-1])


@rows("shift")
def test_a_shifted_cache_holds_the_keys_of_the_new_positions(this):
    """Layer 0 reads only embeddings: its keys are those of a cache that never held the evicted tokens."""
    ids, keep, gone = this.ids(24), 3, 8
    kept = ids[:keep] + ids[keep + gone :]
    for engine in this.engines():
        engine.prefill(kept)
        expected = [np.array(rows, np.float32) for rows in engine.cache.rows(len(kept))]
        engine.reset()
        engine.prefill(ids)
        before = [np.array(rows, np.float32) for rows in engine.cache.rows(len(ids))]
        engine.shift(keep, gone)
        found = [np.array(rows, np.float32) for rows in engine.cache.rows(len(kept))]
        limit = max(this.row.limits[1], 2e-3 if this.row.native else 0) * np.abs(expected[0]).max()
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=limit)
        for values, earlier in zip(found[1::2], before[1::2], strict=True):
            np.testing.assert_array_equal(values, np.delete(earlier, np.s_[keep : keep + gone], axis=2))
        assert np.isfinite(engine.decode(5)).all()


@rows("refused_shift", lambda row: "shift" in row.lacks)
def test_a_cache_that_cannot_be_shifted_says_so(this):
    engine = this.engine()
    engine.prefill(this.ids(9))
    with pytest.raises(InputError, match="cannot be shifted"):
        engine.shift(0, 3)


@rows("greedy")
def test_a_greedy_text_equals_the_references(this):
    """Up to a tie: where weights are rounded, each token is the best but for the distance of two paths."""
    prompt = this.ids(9, seed=3)
    for lookup in (False, True):
        text = [*Generation(this.engine(), Request(prompt, max_new_tokens=24, prompt_lookup=lookup))]
        logits = this.expected([*prompt, *text[:-1]])[len(prompt) - 1 :]
        short = logits.max(-1) - logits[np.arange(len(text)), text]
        assert len(text) == 24
        assert (short <= 2 * this.row.limits[1] * np.abs(logits).max(-1)).all()


# --- several sequences --------------------------------------------------------------------------------------------
@rows("batch")
def test_rows_side_by_side_equal_each_alone(this):
    texts = [this.ids(14, seed=seed) for seed in range(3)]
    expected = np.stack([this.expected(text) for text in texts])
    for engine in this.engines():
        found = [engine.forward([text[:9] for text in texts])[:, -1:]]
        found += [engine.forward([[text[place]] for text in texts]) for place in range(9, 14)]
        this.require_close(np.concatenate(found, 1), expected[:, 8:])


@rows("padding")
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_equal_each_alone(side, this):
    if side == "left" and this.row.graph == "fused":
        with pytest.raises(InputError, match="right"):
            this.engine(graph="all_logits").forward([[0, 5]], [[0, 1]])
        return
    lengths, steps = (6, 3, 1), 4
    texts = [this.ids(length + steps, seed=length) for length in lengths]
    ids, mask = np.zeros((2, 3, 6), np.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        place = slice(length) if side == "right" else slice(6 - length, None)
        ids[row, place], mask[row, place] = text[:length], 1
    new = np.stack([text[-steps:] for text in texts])
    engine = this.engine(graph="all_logits")
    prompt = engine.forward(ids, mask)
    further = np.concatenate([engine.forward(new[:, i : i + 1]) for i in range(steps)], 1)
    for row, text in enumerate(texts):
        this.require_close(np.concatenate([prompt[row][mask[row] == 1], further[row]]), this.expected(text))


# --- proofs and storage -------------------------------------------------------------------------------------------
@rows("slab", lambda row: row.graph == "fused" and row.precision != "fp16")
def test_rows_that_join_idle_run_alone_and_are_cut_equal_each_alone(this):
    rng, graph = random.Random(0), this.engine().graph
    slab, texts, size = Slab(graph, 4), dict[Engine, list[int]](), this.bundle.manifest.vocab_size
    for step in range(60):
        action, row = rng.random(), rng.choice([*texts] or [this.engine()])
        long = [one for one, text in texts.items() if len(text) > this.row.context - 3]
        if long or (action < 0.1 and texts):
            slab.remove(gone := (long or [row])[0])
            del texts[gone]
        elif len(texts) < 3 or action < 0.2:
            one = Engine.over(graph)
            texts[one] = this.ids(rng.choice([2, 9, 20]), seed=step)
            this.require_close(one.prefill(texts[one]), this.expected(texts[one])[-1])
        elif action < 0.5:  # a separate token, after a text that may have been cut
            texts[row] = [*texts[row][: len(texts[row]) - rng.choice([0, 0, 1, 3])], rng.randrange(size)]
            row.cut(len(texts[row]) - 1)
            this.require_close(row.append(texts[row][row.length :]), this.expected(texts[row])[-1])
        else:
            wanted = [one for one in texts if slab.holds(one) and rng.random() < 0.6]
            wanted += [one for one in texts if not slab.holds(one) and len(slab.members) < slab.most][:1]
            tokens = [rng.randrange(size) for _ in wanted]
            for one, token, found in zip(wanted, tokens, slab.decode(wanted, tokens) if wanted else [], strict=True):
                texts[one].append(token)
                this.require_close(found, this.expected(texts[one])[-1])


@rows("golden")
def test_golden_logits_are_the_references(this):
    stored = golden.Golden.of(this.bundle)
    assert max(golden.differences(this.engine(), stored)) <= stored.limit
    expected = this.of_source(stored.ids.tolist())[stored.ends - 1]
    assert np.abs(stored.logits - expected).max() <= this.row.limits[0] * np.abs(expected).max()


@rows("placement")
def test_the_bundle_runs_where_its_manifest_says(this):
    manifest, engine = this.bundle.manifest, this.engine()
    assert (manifest.graph, manifest.precision) == (this.row.graph, this.row.precision)
    assert engine.providers == ["CPUExecutionProvider"]
    assert engine.graph.kernels.startswith("native" if this.row.native else "onnxruntime")
    assert set(manifest.files) | {names.MANIFEST} == {
        path.relative_to(this.bundle.path).as_posix() for path in this.bundle.path.rglob("*") if path.is_file()
    }


@rows("session")
def test_a_saved_session_goes_on_as_the_open_one(this, tmp_path):
    ids = this.ids(15, seed=4)
    with this.load() as lm:
        session = lm.session()
        session.append(ids)
        session.save(tmp_path / "session.npz")
        expected = session.generate(max_new_tokens=6).ids
    with this.load() as lm:
        session = lm.load_session(tmp_path / "session.npz")
        assert session.ids == ids
        assert session.generate(max_new_tokens=6).ids == expected


@rows("states", lambda row: row.build is hybrid)
def test_a_saved_session_whose_states_are_not_this_bundles_is_refused(this, tmp_path):
    model, file = this.load(), tmp_path / "session.npz"
    with model.session() as session:
        session.append(this.ids(9))
        session.save(file)
    with np.load(file) as found:
        content = {**found}
    *_, last = (name for name in content if name.startswith("arr_"))
    for spoilt in (None, content[last][:, 1:], content[last].astype(np.float64), content[last].astype(np.float16)):
        np.savez(file, **{name: array for name, array in (content | {last: spoilt}).items() if array is not None})
        with pytest.raises(IntegrityError, match="session"):
            model.load_session(file)


@rows("hidden_states", exported_with("hidden_states"))
def test_hidden_states_are_what_the_head_multiplies(this):
    ids = this.ids(20)
    expected = head_input(this.module, np.array(ids))
    engine = this.engine()
    found = np.concatenate([engine.hidden_states([ids[:12]])[0], *(engine.hidden_states([[i]])[0] for i in ids[12:])])
    assert np.abs(found - expected).max() <= this.row.limits[0] * np.abs(expected).max()


# --- in other programs --------------------------------------------------------------------------------------------
@rows("plain")
def test_plain_onnxruntime_computes_the_same(this):
    ids = this.ids(this.row.context)
    expected = this.expected(ids)
    graphs = [this.bundle.all_logits_graph, this.bundle.last_logits_graph]
    if this.row.options.get("format") == "ort":
        graphs.append(this.bundle.path / names.ORT_GRAPH)
    for graph in graphs:
        session = open_graph(graph)
        for sizes in ([len(ids)], [1] * len(ids), [20, 1, len(ids) - 21]):
            text, ends = Text(session), np.cumsum(sizes)
            found = np.stack([text.read(part.tolist())[-1] for part in np.split(np.array(ids), ends[:-1])])
            this.require_close(found, expected[ends - 1])


@rows("generate", exported_with("generate"))
def test_the_graph_of_whole_generations_draws_the_runtimes_ids(this):
    prompt = this.ids(9, seed=5)
    session = open_graph(this.bundle.path / names.GENERATE_GRAPH)
    for config in (
        SamplingConfig(seed=0),
        SamplingConfig(repetition_penalty=1.3, seed=0),
        SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=11),
    ):
        feeds = as_feeds(config, 20) | {names.INPUT_IDS: np.array([prompt])}
        request = Request(prompt, max_new_tokens=20, sampling=config, prompt_lookup=False)
        (found,) = session.run([names.GENERATED_IDS], feeds)
        assert found.tolist() == [*Generation(this.engine(), request)], config
    assert (this.bundle.path / names.GENERATE_STEP_GRAPH).exists() == (why_no_step(this.bundle.manifest) is None)
