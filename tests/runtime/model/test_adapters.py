"""LoRA adapters of a loaded model. The expected texts are those of the decoder with the adapter in its weights."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, OptionError
from pastkey.files.durable import write_json
from pastkey.runtime import Generator, load
from pastkey.runtime.decoding.batching.scheduler import Scheduler
from pastkey.runtime.engine.caches.slab import Slab

from ..adapters import lora, merged, write_adapter
from ..conftest import log_softmax
from ..tiny_decoder import write_bundle

PROMPT = [5, 1, 30, 2, 2, 7, 19, 4]
COUNT: dict[str, Any] = {"max_new_tokens": 12}
NAMES = ("one", "two", None)
ADAPTED = {"one": ["wq0", "wv0", "wo1"], "two": ["wk1", "wo0"]}


@pytest.fixture(scope="module", params=["fused", "standard"])
def folder(request, tiny, tmp_path_factory):
    """A bundle, with its adapters next to it."""
    made = tmp_path_factory.mktemp(request.param)
    write_bundle(made / "bundle", tiny, request.param, adapters=True)
    for seed, (name, weights) in enumerate(ADAPTED.items()):
        write_adapter(made / name, lora(tiny, weights, seed=seed), lora_alpha=2, r=2)
    return made


@pytest.fixture
def lm(folder):
    return load(folder / "bundle", adapters={name: folder / name for name in ADAPTED})


@pytest.fixture(scope="module")
def expected(tiny):
    texts: dict[str | None, list[int]] = {None: tiny.greedy(PROMPT, 12)}
    for seed, (name, weights) in enumerate(ADAPTED.items()):
        texts[name] = merged(tiny, lora(tiny, weights, seed=seed)).greedy(PROMPT, 12)
    assert len({tuple(ids) for ids in texts.values()}) == 3
    return texts


def test_each_request_has_the_text_and_the_logits_of_its_merged_model(lm, expected, tiny):
    for name in (*NAMES, *NAMES):
        assert lm.generate(PROMPT, **COUNT, adapter=name).ids == expected[name]
    logits = merged(tiny, lora(tiny, ADAPTED["one"], seed=0))(PROMPT)
    np.testing.assert_allclose(lm.logits(PROMPT, "one"), logits, rtol=0, atol=1e-4)
    total = log_softmax(logits)[np.arange(len(PROMPT) - 1), PROMPT[1:]].sum()
    assert lm.score(PROMPT, "one").total == pytest.approx(total, abs=1e-3)


def test_the_eos_token_of_an_adapters_tokenizer_ends_its_texts_alone(tiny, letters, tmp_path):
    whole, base = (decoder.greedy(PROMPT, 12) for decoder in (merged(tiny, lora(tiny, ADAPTED["one"])), tiny))
    end = next(token for token in whole[2:] if token in base)  # the base model continues after it
    write_bundle(tmp_path / "bundle", tiny, "fused", adapters=True, tokenizer=letters)
    folder = write_adapter(tmp_path / "one", lora(tiny, ADAPTED["one"]), lora_alpha=2, r=2)
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": letters.id_to_token(end)}})
    lm = load(tmp_path / "bundle", adapters={"one": folder})
    found = lm.generate(PROMPT, **COUNT, adapter="one")
    assert (found.ids, found.finish_reason) == (whole[: whole.index(end)], "stop")
    assert lm.generate(PROMPT, **COUNT, adapter="one", eos_token_id=[]).ids == whole
    assert lm.generate(PROMPT, **COUNT).ids == base


def test_requests_of_one_adapter_are_batched_and_all_get_on(lm, expected, monkeypatch):
    batches, decode = [], Slab.decode

    def watched(slab: Slab, engines: Any, tokens: Any) -> Any:
        batches.append({id(engine.graph) for engine in engines})
        return decode(slab, engines, tokens)

    monkeypatch.setattr(Slab, "decode", watched)
    streams = [lm.stream(PROMPT, **COUNT, adapter=name, prompt_lookup=False) for name in NAMES * 3]
    found: list[list[int]] = [[] for _ in streams]
    for _ in range(12):  # one thread reads all in turn
        for ids, stream in zip(found, streams, strict=True):
            ids += next(stream).ids
    assert found == [expected[name] for name in NAMES * 3]
    assert all(len(graphs) == 1 for graphs in batches)
    if lm.manifest.graph == "fused":
        assert len({graph for graphs in batches for graph in graphs}) == 3


@pytest.mark.parametrize("folder", ["fused"], indirect=True)  # the standard graph has no batches
def test_the_batch_of_the_request_that_waited_longest_is_next(lm, monkeypatch):
    turns, decode = [], Scheduler._decode

    def watched(scheduler: Scheduler, rows: Any) -> None:
        turns.append(rows[0].engine.graph)
        decode(scheduler, rows)

    one, two = (lm.parts.adapted(name).engine.graph for name in ("one", "two"))
    streams = [lm.stream(PROMPT, **COUNT, adapter=name, prompt_lookup=False) for name in ("one", "one", "two", "two")]
    for stream in streams:
        next(stream)
    monkeypatch.setattr(Scheduler, "_decode", watched)
    lm.scheduler._waiting = [stream._generation for stream in streams]  # as if a thread waited for each
    for _ in range(4):
        lm.scheduler._step()
    assert turns == [one, two, one, two]


def test_a_cached_prefix_serves_its_own_adapter_alone(lm, expected):
    for cached in (False, True):
        for name in NAMES:
            found = lm.generate(PROMPT, **COUNT, adapter=name, reuse_prefix=True)
            assert (found.cached_tokens > 0, found.ids) == (cached, expected[name])


def test_a_session_keeps_its_adapter_and_so_does_its_file(lm, expected, tmp_path):
    session = lm.session("one")
    session.append(PROMPT)
    session.save(tmp_path / "one.npz")
    for one in (session.fork(), lm.load_session(tmp_path / "one.npz", "one")):
        assert one.generate(**COUNT).ids == expected["one"]
    for name in ("two", None):
        with pytest.raises(IntegrityError, match="was saved with an adapter, and not with the one that"):
            lm.load_session(tmp_path / "one.npz", name)
    with pytest.raises(OptionError, match="has no option 'adapter'"):
        session.generate(adapter="two")


def test_an_adapter_is_unloaded_while_a_request_runs_to_its_end(lm, folder, expected):
    lm.generate(PROMPT, **COUNT, adapter="one", reuse_prefix=True)
    session = lm.session("one")
    stream = lm.stream(PROMPT, **COUNT, adapter="one", reuse_prefix=True)
    first = next(stream)
    stored = len(lm.scheduler.store)
    lm.unload_adapter("one")
    assert len(lm.scheduler.store) < stored
    assert [*first.ids, *(token for chunk in stream for token in chunk.ids)] == expected["one"]
    assert len(lm.scheduler.store) < stored  # it is not stored at its end either
    assert session.generate(PROMPT, **COUNT).ids == expected["one"]
    with pytest.raises(InputError, match="there is no adapter 'one', loaded are 'two'"):
        lm.generate(PROMPT, adapter="one")
    lm.load_adapter("one", folder / "one")
    assert lm.generate(PROMPT, **COUNT, adapter="one").ids == expected["one"]


def test_the_adapter_graph_opens_with_the_first_adapter_and_closes_with_the_last(folder):
    lm, graphs = load(folder / "bundle"), list[Any]()
    assert lm.adapters._graph is None
    for name in ADAPTED:
        lm.load_adapter(name, folder / name)
        graphs.append(lm.adapters._graph)
    assert graphs[0] is graphs[1] is not None
    for name in ADAPTED:
        lm.unload_adapter(name)
    assert lm.adapters._graph is None


def test_another_process_and_the_command_load_the_same_adapters(lm, folder, expected, command):
    copied = pickle.loads(pickle.dumps(lm))
    assert copied.generate(PROMPT, **COUNT, adapter="two").ids == expected["two"]
    flags = ("--adapter", folder / "two", "--prompt-ids", str(PROMPT)[1:-1], "--max-new-tokens", 12, "--json")
    status, out, err = command("run", folder / "bundle", *flags)
    assert (status, json.loads(out)["ids"], err) == (0, expected["two"], "")


def test_each_row_of_a_batch_names_its_adapter(folder, lm):
    adapters, named = {name: folder / name for name in ADAPTED}, ["one", None, "two", "one", "three", "two"]
    generator = Generator(folder / "bundle", adapters=adapters, **COUNT, logprobs=0)
    rows = generator({"prompt": [PROMPT] * 6, "adapter": named})
    generator.close()
    for name, error, logprobs in zip(named, rows["error"], rows["logprobs"], strict=True):
        assert bool(error) is (name == "three")
        if not error:
            expected = lm.generate(PROMPT, **COUNT, adapter=name, logprobs=0).logprobs
            found = [token["logprob"] for token in json.loads(logprobs)]
            assert found == pytest.approx([token.logprob for token in expected], abs=1e-4)


REFUSED: list[tuple[Any, str]] = [
    (lambda lm, at: lm.load_adapter("one", at / "one"), "an adapter 'one' is loaded already"),
    (lambda lm, at: lm.load_adapter("", at / "one"), "adapter is ''; it must be a text of at least one"),
    (lambda lm, at: lm.unload_adapter("three"), "there is no adapter 'three'"),
    (lambda lm, at: lm.session("three"), "there is no adapter 'three'"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_what_is_wrong_is_told(call, words, lm, folder):
    with pytest.raises(InputError, match=words):
        call(lm, folder)


def test_a_bundle_without_the_graph_says_how_to_get_it(fused_bundle, folder):
    with pytest.raises(InputError, match=r"export it again with .* --adapters"):
        load(fused_bundle.path, adapters={"one": folder / "one"})
