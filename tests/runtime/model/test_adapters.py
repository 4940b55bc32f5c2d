"""LoRA adapters of a loaded model. The expected texts are those of the decoder with the adapter in its weights."""

from __future__ import annotations

import json
import pickle
from typing import Any, cast

import numpy as np
import pytest

from pastkey.errors import InputError, IntegrityError, OptionError
from pastkey.files.durable import write_json
from pastkey.runtime import Generator, load
from pastkey.runtime.decoding.batching.scheduler import Scheduler
from pastkey.runtime.engine.caches.slab import Slab

from ..adapters import lora, merged, write_adapter
from ..conftest import write_bundle

PROMPT = [5, 1, 30, 2, 2, 7, 19, 4]
COUNT = 12
NAMES = ("one", "two", None)
ADAPTED = {"one": ["wq0", "wv0", "wo1"], "two": ["wk1", "wo0"]}


@pytest.fixture(scope="module", params=["fused", "standard"])
def folder(request, tiny, tmp_path_factory):
    """A bundle, with its adapters beside it."""
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
    found: dict[str | None, list[int]] = {None: tiny.greedy(PROMPT, COUNT)}
    for seed, (name, weights) in enumerate(ADAPTED.items()):
        found[name] = merged(tiny, lora(tiny, weights, seed=seed)).greedy(PROMPT, COUNT)
    assert len({tuple(ids) for ids in found.values()}) == 3
    return found


def test_each_request_has_the_text_of_its_merged_model(lm, expected):
    for name in (*NAMES, *NAMES):
        assert lm.generate(PROMPT, max_new_tokens=COUNT, adapter=name).ids == expected[name]


def test_the_eos_token_of_an_adapters_tokenizer_ends_its_texts_alone(tiny, letters, tmp_path):
    whole = merged(tiny, lora(tiny, ADAPTED["one"])).greedy(PROMPT, COUNT)
    base = tiny.greedy(PROMPT, COUNT)
    end = next(token for token in whole[2:] if token in base)  # the base model goes on behind it
    write_bundle(tmp_path / "bundle", tiny, "fused", adapters=True, tokenizer=letters)
    folder = write_adapter(tmp_path / "one", lora(tiny, ADAPTED["one"]), lora_alpha=2, r=2)
    token = letters.id_to_token(end)
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": token}})
    lm = load(tmp_path / "bundle", adapters={"one": folder})
    found = lm.generate(PROMPT, max_new_tokens=COUNT, adapter="one")
    assert (found.ids, found.finish_reason) == (whole[: whole.index(end)], "stop")
    assert lm.generate(PROMPT, max_new_tokens=COUNT, adapter="one", eos_token_id=[]).ids == whole
    assert lm.generate(PROMPT, max_new_tokens=COUNT).ids == base


def test_logits_and_scores_are_those_of_the_merged_model(lm, tiny):
    model = merged(tiny, lora(tiny, ADAPTED["one"], seed=0))
    np.testing.assert_allclose(lm.logits(PROMPT, "one"), model(PROMPT), rtol=0, atol=1e-4)
    logits = model(PROMPT)[:-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = logprobs[np.arange(len(logits)), PROMPT[1:]].sum()
    assert lm.score(PROMPT, "one").total == pytest.approx(total, abs=1e-3)


def test_requests_of_one_adapter_are_batched_and_all_get_on(lm, expected, monkeypatch):
    batches, decode = [], Slab.decode

    def watched(slab: Slab, engines: Any, tokens: Any) -> Any:
        batches.append({id(engine.graph) for engine in engines})
        return decode(slab, engines, tokens)

    monkeypatch.setattr(Slab, "decode", watched)
    streams = [
        lm.stream(PROMPT, max_new_tokens=COUNT, adapter=name, prompt_lookup=False) for name in NAMES for _ in range(3)
    ]
    found: dict[int, list[int]] = {place: [] for place in range(len(streams))}
    for _ in range(COUNT + 1):  # one thread reads all in turn
        for place, stream in enumerate(streams):
            chunk = next(stream, None)
            found[place] += [] if chunk is None else chunk.ids
    assert found == {place: expected[NAMES[place // 3]] for place in range(len(streams))}
    assert all(len(graphs) == 1 for graphs in batches)
    if lm.manifest.graph == "fused":
        assert len({graph for graphs in batches for graph in graphs}) == 3


@pytest.mark.parametrize("folder", ["fused"], indirect=True)  # the standard graph has no batches
def test_the_batch_of_the_request_that_waited_longest_is_next(lm, monkeypatch):
    turns, decode = [], Scheduler._decode

    def watched(scheduler: Scheduler, rows: Any) -> None:
        turns.append(rows[0].engine.graph)
        decode(scheduler, rows)

    monkeypatch.setattr(Scheduler, "_decode", watched)
    graphs = [lm.parts.adapted(name).engine.graph for name in ("one", "two")]
    streams = [
        lm.stream(PROMPT, max_new_tokens=COUNT, adapter=name, prompt_lookup=False)
        for name in ("one", "two")
        for _ in range(2)
    ]
    for stream in streams:
        next(stream)
    del turns[:]
    scheduler = lm.scheduler
    scheduler._waiting = [stream._generation for stream in streams]  # as if a thread waited for each
    for _ in range(4):
        scheduler._step()
    assert turns == [graphs[0], graphs[1], graphs[0], graphs[1]]


def test_a_cached_prefix_serves_its_own_adapter_alone(lm, expected):
    for name in NAMES:
        first = lm.generate(PROMPT, max_new_tokens=COUNT, adapter=name, reuse_prefix=True)
        assert (first.cached_tokens, first.ids) == (0, expected[name])
    for name in NAMES:
        again = lm.generate(PROMPT, max_new_tokens=COUNT, adapter=name, reuse_prefix=True)
        assert again.cached_tokens > 0
        assert again.ids == expected[name]


def test_a_session_keeps_its_adapter_and_so_does_its_file(lm, expected, tmp_path):
    session = lm.session("one")
    session.append(PROMPT)
    session.save(tmp_path / "one.npz")
    assert session.fork().generate(max_new_tokens=COUNT).ids == expected["one"]
    assert lm.load_session(tmp_path / "one.npz", "one").generate(max_new_tokens=COUNT).ids == expected["one"]
    for name in ("two", None):
        with pytest.raises(IntegrityError, match="was saved with an adapter, and not with the one that"):
            lm.load_session(tmp_path / "one.npz", name)
    with pytest.raises(OptionError, match="has no option 'adapter'"):
        session.generate(adapter="two")


def test_an_adapter_is_unloaded_while_a_request_runs_to_its_end(lm, folder, expected):
    lm.generate(PROMPT, max_new_tokens=COUNT, adapter="one", reuse_prefix=True)
    session = lm.session("one")
    stream = lm.stream(PROMPT, max_new_tokens=COUNT, adapter="one", reuse_prefix=True)
    first = next(stream)
    stored = len(lm.scheduler.store)
    lm.unload_adapter("one")
    assert len(lm.scheduler.store) < stored
    assert [*first.ids, *(token for chunk in stream for token in chunk.ids)] == expected["one"]
    assert len(lm.scheduler.store) < stored  # it is not stored at its end either
    session.append(PROMPT)
    assert session.generate(max_new_tokens=COUNT).ids == expected["one"]
    with pytest.raises(InputError, match="there is no adapter 'one', loaded are 'two'"):
        lm.generate(PROMPT, adapter="one")
    lm.load_adapter("one", folder / "one")
    assert lm.generate(PROMPT, max_new_tokens=COUNT, adapter="one").ids == expected["one"]


def test_the_adapter_graph_opens_with_the_first_adapter_and_closes_with_the_last(folder):
    lm = load(folder / "bundle")
    assert lm.adapters._graph is None
    lm.load_adapter("one", folder / "one")
    graph = lm.adapters._graph
    lm.load_adapter("two", folder / "two")
    assert lm.adapters._graph is graph is not None
    lm.unload_adapter("one")
    lm.unload_adapter("two")
    assert lm.adapters._graph is None


def test_another_process_loads_the_same_adapters(lm, expected):
    copied = pickle.loads(pickle.dumps(lm))
    assert copied.generate(PROMPT, max_new_tokens=COUNT, adapter="two").ids == expected["two"]


def test_the_command_takes_a_folder(command, folder, expected):
    arguments = ["--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", COUNT, "--json"]
    status, out, err = command("run", folder / "bundle", "--adapter", folder / "two", *arguments)
    assert (status, json.loads(out)["ids"], err) == (0, expected["two"], "")


def test_each_row_of_a_batch_names_its_adapter(folder, lm):
    adapters = {name: folder / name for name in ADAPTED}
    generator = Generator(folder / "bundle", adapters=adapters, max_new_tokens=COUNT, logprobs=0)
    rows = generator({"prompt": [PROMPT] * 6, "adapter": ["one", None, "two", "one", "three", "two"]})
    assert [bool(error) for error in rows["error"]] == [False, False, False, False, True, False]
    for row, name in enumerate(["one", None, "two", "one"]):
        expected = lm.generate(PROMPT, max_new_tokens=COUNT, adapter=name, logprobs=0)
        found = [token["logprob"] for token in json.loads(rows["logprobs"][row])]
        assert found == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-4)
    generator.close()


REFUSED: dict[str, tuple[Any, str]] = {
    "loaded already": (lambda lm, at: lm.load_adapter("one", at / "one"), "an adapter 'one' is loaded already"),
    "no name": (lambda lm, at: lm.load_adapter("", at / "one"), "adapter is ''; it must be a text of at least one"),
    "unloading none": (lambda lm, at: lm.unload_adapter("three"), "there is no adapter 'three'"),
    "a session of none": (lambda lm, at: lm.session("three"), "there is no adapter 'three'"),
    "a number": (lambda lm, at: lm.generate(PROMPT, adapter=3), "adapter is 3"),
    "a list": (
        lambda lm, at: load(at / "bundle", adapters=cast("Any", ["one"])),
        "adapters is .*a mapping of names to folders",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told(case, lm, folder):
    call, words = REFUSED[case]
    with pytest.raises(InputError, match=words):
        call(lm, folder)


def test_a_bundle_without_the_graph_says_how_to_get_it(fused_bundle, folder):
    with pytest.raises(InputError, match=r"export it again with .* --adapters"):
        load(fused_bundle.path, adapters={"one": folder / "one"})
