"""Whole generations by plain onnxruntime: the runtime's ids, the ends of a text, the cache that goes out and in."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from pastkey.contract import names
from pastkey.contract.bundle import Bundle, KVGeometry, RowsGeometry, open_bundle
from pastkey.errors import InputError, ParityError
from pastkey.export import export
from pastkey.export.generation import write
from pastkey.export.generation.loop import why_no_step
from pastkey.export.generation.write import settings as as_feeds
from pastkey.export.settings import ExportConfig
from pastkey.runtime import Engine, Generation, Request, SamplingConfig

from ..decoders import Plain, llama
from ..plain_loop import open_graph

CONTEXT = 40
DRAWN = SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=11)


@pytest.fixture(scope="module")
def made(made_once):
    """made(GRAPH): the bundle with that graph."""

    def make(graph):
        options = {"graph": graph, "context_length": CONTEXT, "generate": True}
        folder = made_once(f"generate-{graph}", lambda folder: export(llama(), folder / "bundle", "fp32", **options))
        return open_bundle(folder / "bundle", verify=True)

    return make


@pytest.fixture(scope="module")
def fused(made):
    return made("fused")


def call(bundle: Bundle, prompt: list[int], new: int, config: SamplingConfig, ends: tuple[int, ...] = ()) -> list[int]:
    feeds = as_feeds(config, new, ends) | {names.INPUT_IDS: np.array([prompt], np.int64)}
    (ids,) = open_graph(bundle.path / names.GENERATE_GRAPH).run([names.GENERATED_IDS], feeds)
    assert (ids.dtype, ids.ndim) == (np.int64, 1)
    return ids.tolist()


def runtime(bundle: Bundle, prompt: list[int], new: int, config: SamplingConfig) -> list[int]:
    engine = Engine(bundle, threads=1)
    return list(Generation(engine, Request(prompt, max_new_tokens=new, sampling=config, prompt_lookup=False)))


def test_inputs_and_outputs_are_those_that_the_format_names(fused):
    inputs = {v.name: (v.type, v.shape) for v in open_graph(fused.path / names.GENERATE_GRAPH).get_inputs()}
    expected = dict.fromkeys(names.GENERATE_NUMBERS, ("tensor(float)", [1]))
    expected |= dict.fromkeys(names.GENERATE_INTEGERS, ("tensor(int64)", [1]))
    expected |= {"end_ids": ("tensor(int64)", ["ends"]), "input_ids": ("tensor(int64)", [1, "tokens"])}
    assert inputs == expected
    assert set(ir.load(fused.path / names.GENERATE_GRAPH).opset_imports) <= {"", "com.microsoft"}


def test_the_weights_are_those_of_the_bundles_file(fused):
    files = {path.name for path in (fused.path / "onnx").iterdir() if names.is_weights_file(path.name)}
    assert len(files) == 1
    for name in (names.GENERATE_GRAPH, names.GENERATE_STEP_GRAPH):
        model = ir.load(fused.path / name)
        stored = [v.const_value for v in model.graph.initializers.values()]
        assert {t.location for t in stored if isinstance(t, ir.ExternalTensor)} == files
        loop = next(node for node in model.graph if node.op_type == "Loop")
        # One scope above the nodes, where they are prepacked.
        assert not loop.attributes["body"].as_graph().initializers


def test_a_text_ends_at_an_end_id_which_is_its_last(fused):
    free = call(fused, [5, 9, 11], 30, DRAWN)
    end = free[12]
    cut = call(fused, [5, 9, 11], 30, DRAWN, (end, 1_000_000))
    assert cut == free[: free.index(end) + 1]
    assert call(fused, [5, 9, 11], 30, DRAWN, (1_000_000,)) == free


@pytest.mark.parametrize("tokens", [1, CONTEXT - 1, CONTEXT])
def test_a_text_ends_one_token_behind_the_context(fused, tokens):
    prompt = [3 + i % 7 for i in range(tokens)]
    assert call(fused, prompt, 10**12, DRAWN) == runtime(fused, prompt, 10**6, DRAWN)
    assert len(call(fused, prompt, 10**12, DRAWN)) == CONTEXT + 1 - tokens


@pytest.mark.parametrize(
    ("prompt", "change", "sentence"),
    [
        ([], {}, "input_ids must hold at least one token"),
        ([-1], {}, r"token ids must be 0 to \d+"),
        ([1] * (CONTEXT + 1), {}, "the text is longer than the context of 40 tokens"),
        ([1], {"temperature": -0.5}, r"temperature must be a number from 0 to 2\*\*127"),
        ([1], {"temperature": np.nan}, r"temperature must be a number from 0 to 2\*\*127"),
        ([1], {"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ([1], {"min_p": -0.1}, "min_p must be between 0 and 1"),
        ([1], {"repetition_penalty": 0.0}, r"repetition_penalty must be above 0 and at most 2\*\*127"),
        ([1], {"seed": -1}, "seed must be 0 or more"),
        ([1], {"top_k": -1}, "top_k must be 0 or more"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
    ],
)
def test_bad_input_ends_the_run_with_a_sentence(fused, prompt, change, sentence):
    feeds = as_feeds(DRAWN, 4) | {names.INPUT_IDS: np.array(prompt, np.int64).reshape(1, -1)}
    feeds |= {name: np.array([value], feeds[name].dtype) for name, value in change.items()}
    with pytest.raises(Exception, match=f"Name:'{sentence}'"):
        open_graph(fused.path / names.GENERATE_GRAPH).run(None, feeds)


def test_weights_that_are_no_numbers_end_the_run_with_a_sentence(fused, tmp_path):
    bundle = Bundle(Path(shutil.copytree(fused.path, tmp_path / "bundle")), fused.manifest)
    path = bundle.path / names.GENERATE_GRAPH
    model = ir.load(path)
    head = max(model.graph.initializers.values(), key=lambda value: value.const_value.nbytes)
    head.const_value = ir.tensor(np.full_like(head.const_value.numpy(), np.nan))
    ir.save(model, path)
    with pytest.raises(Exception, match="the logits are not finite"):
        call(bundle, [1, 2], 3, DRAWN)


# --- in steps -----------------------------------------------------------------------------------------------------
class Host:
    """The steps of a program in another language: four lines for each call."""

    def __init__(self, bundle: Bundle) -> None:
        self.session = open_graph(bundle.path / names.GENERATE_STEP_GRAPH)
        cache = next(value for value in self.session.get_inputs() if value.name == names.HELD_CACHE)
        self.cache = np.zeros([size if isinstance(size, int) else 0 for size in cache.shape], np.float32)
        self.history = np.zeros(0, np.int64)

    def __call__(self, ids: list[int], new: int, config: SamplingConfig) -> list[int]:
        feeds = as_feeds(config, new) | {names.HELD_CACHE: self.cache, names.HELD_IDS: self.history}
        feeds[names.INPUT_IDS] = np.array([ids], np.int64)
        made, self.cache, self.history = self.session.run(["ids", names.NEW_CACHE, names.NEW_IDS], feeds)
        return made.tolist()


@pytest.mark.parametrize(
    ("graph", "size"), [("fused", 1), ("fused", 3), pytest.param("standard", 3, marks=pytest.mark.slow)]
)
def test_chunks_say_what_one_call_says(graph, size, made):
    bundle = made(graph)
    for config in (SamplingConfig(seed=0, repetition_penalty=1.2), DRAWN):
        whole, host = call(bundle, [5, 9, 11], 25, config), Host(bundle)
        ids, fed = list[int](), [5, 9, 11]
        while len(ids) < 25:
            ids += host(fed, min(size, 25 - len(ids)), config)
            fed = ids[-1:]
        assert ids == whole
        assert host.history.tolist() == [5, 9, 11, *ids[:-1]]
        assert host.cache.shape[3] == 3 + 24


def test_a_second_turn_goes_on_from_the_first_ones_cache_or_from_its_beginning(fused):
    host = Host(fused)
    assert host([5, 9], 0, DRAWN) == []
    assert host.history.size == 0  # no new tokens feed nothing
    answer = host([5, 9, 11], 6, DRAWN)
    assert host([answer[-1], 7, 8], 6, DRAWN) == call(fused, [5, 9, 11, *answer, 7, 8], 6, DRAWN)
    host.history = host.history[:2]  # forgets the rest of the cache
    assert host([3], 6, DRAWN) == call(fused, [5, 9, 3], 6, DRAWN)


def test_what_does_not_fit_the_context_or_has_no_cache_is_refused(fused):
    host = Host(fused)
    ids = host([5] * 30, 10**6, DRAWN)
    assert len(ids) == CONTEXT + 1 - 30
    assert host(ids[-1:], 4, DRAWN) == []
    with pytest.raises(Exception, match="the text is longer than the context of 40 tokens"):
        host([1, 2], 4, DRAWN)
    host = Host(fused)
    host.history = np.array([1, 2])
    with pytest.raises(Exception, match="history must have no more ids than cache has rows"):
        host([3], 2, DRAWN)


@pytest.mark.parametrize(
    ("layers", "rows", "reason"),
    [
        ((KVGeometry(2, 8, 8), KVGeometry(2, 8, 8)), (), None),
        ((KVGeometry(2, 8, 8), KVGeometry(4, 8, 8)), (), "2 heads of 8, 4 heads of 8"),
        ((KVGeometry(2, 8, 16),), (), "2 heads of 8, 2 heads of 16"),
        ((KVGeometry(2, 8, 8),), (RowsGeometry(3, 8),), "short convolutions"),
    ],
)
def test_a_cache_of_several_shapes_has_no_step(fused, layers, rows, reason):
    found = why_no_step(dataclasses.replace(fused.manifest, layers=layers, rows=rows))
    assert (found is None) if reason is None else (reason in str(found))


# --- what --generate writes is proved against the runtime, or refused -------------------------------------------------
def test_a_graph_that_says_something_else_is_not_kept(tmp_path, monkeypatch):
    settings = write.settings

    def other_seed(*given):
        return settings(*given) | {"seed": settings(*given)["seed"] + 1}

    monkeypatch.setattr(write, "settings", other_seed)
    with pytest.raises(ParityError, match=r"generate\.onnx gives other ids than pastkey's runtime from new token"):
        export(llama(), tmp_path / "bundle", precision="fp32", context_length=40, generate=True)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_what_is_not_made_is_said(tmp_path):
    module = Plain(value_size=16, layers=2)
    report = export(module, tmp_path / "bundle", precision="fp32", context_length=40, generate=True)
    (said,) = (warning for warning in report.warnings if "generate_step" in warning)
    assert "is not made: its keys and values differ in shape from layer to layer" in said
    assert names.GENERATE_GRAPH in open_bundle(tmp_path / "bundle").manifest.files


def test_nothing_is_written_unless_it_is_asked_for(exported):
    assert not [*(exported("llama").bundle.path / "onnx").glob("generate*")]


@pytest.mark.parametrize(
    ("option", "words"),
    [({"target": "qnn"}, "--target qnn"), ({"target": "webgpu"}, "--target webgpu"), ({"graph": "static"}, "a static")],
)
def test_what_runs_no_loop_is_refused_before_the_work(option, words):
    with pytest.raises(InputError, match=f"--generate and {words}.* exclude each other"):
        ExportConfig(precision="fp32", context_length=40, generate=True, **option)
