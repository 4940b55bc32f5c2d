"""benchmarks/ on tiny decoders without another engine: each question, the arithmetic, the store, and the workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from benchmarks.__main__ import QUESTIONS, main, quoted, write_page
from benchmarks.measure import NOT_TOLD, ROOT, BenchmarkError, Spread, interleaved, paired
from benchmarks.peers import side_by_side
from benchmarks.peers.convert import Source, of_bundle, with_context
from benchmarks.peers.engines import ENGINES, STREAM_ENGINES, Engine, Prepared, Worker
from benchmarks.serve import Reply, Served, percentile
from benchmarks.store import Store, digest_of_files
from benchmarks.texts import open_text
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.runtime import Engine as Session
from pastkey.runtime import load

from .runtime import tiny_decoder as decoder
from .runtime.constraints import vocabularies
from .shared import divided
from .tiny_bundles import byte_bundle

BY_NAME = {question.name: question for question in QUESTIONS}


def byte_level() -> Tokenizer:
    """A token for each byte, and one that begins every text."""
    tokenizer: Tokenizer = vocabularies.byte_level()
    begin = (vocabularies.END, tokenizer.token_to_id(vocabularies.END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return tokenizer


# --- the questions ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny/, of random weights, which accepts any text."""
    folder = tmp_path_factory.mktemp("bundles")
    byte_bundle(folder / "tiny", context=1200, tokenizer=byte_level(), hidden_size=decoder.E)
    return folder


# Those that ask only the tiny bundle.
IN_CI = ("step-cost", "batch", "speculation")
ASKED = {
    "step-cost": "tiny --threads 1 --rounds 1 --new-tokens 4",
    "two-graphs": "tiny tiny --rounds 1 --contexts 8 20 --chunk 4",
    "prefixes": "tiny --threads 1 --rounds 2 --prompt-tokens 40",
    "memory": "tiny --lengths 8 20 --new-tokens 3",
    "stories": "tiny --count 2",
    "constrained": "tiny --threads 1 --rounds 1",
    "batch": "tiny --threads 1 --rounds 1 --count 2 --new-tokens 4",
    "text-embeddings": "tiny --threads 1 --rounds 1 --reference tiny",
    "speculation": "tiny --draft tiny --prompt-tokens 8 --new-tokens 6 --places 1 --rounds 1",
    "application": "tiny --threads 1 --ticks 5 --rounds 1 --new-tokens 4",
}


def test_every_question_is_quoted_on_a_page():
    assert all(quoted(question) for question in QUESTIONS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", divided(ASKED, ci=IN_CI))
def test_a_question_is_answered(name, folder, monkeypatch):
    if name == "constrained":
        pytest.importorskip("llguidance")
    monkeypatch.chdir(folder)
    assert main([name, *ASKED[name].split(), "--json", "answer.json", "--page", "answer.md"]) == 0
    found = json.loads(Path("answer.json").read_text(encoding="utf-8"))
    assert found["facts"][0].startswith(f"`python -m benchmarks {name} ")
    for part in found["answer"]:
        assert isinstance(part, str) or (part["rows"] and {len(row) for row in part["rows"]} == {len(part["columns"])})
    assert f"# {BY_NAME[name].asks}" in Path("answer.md").read_text(encoding="utf-8")


# --- the command --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing"], "invalid choice: 'nothing' (choose from 'peers'"),
        (["peers", "--text", "none.txt"], "none.txt is not a file"),
        (["peers", "--only", "vllm"], "no engine 'vllm'; the engines are pastkey-int8, pastkey-int8-steps"),
        (["memory", "none"], "none does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status: object = main(words)
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr()
    assert (status, told.out, len(told.err.splitlines())) == (2, "", 1)
    assert sentence in told.err


def test_a_section_is_put_between_the_markers_of_its_page(tmp_path):
    page, question = tmp_path / "page.md", BY_NAME["demo"]
    page.write_text("before\n\n<!-- benchmarks demo -->\nold\n<!-- end of demo -->\n\nafter\n")
    write_page(page, question, "new")
    assert page.read_text() == "before\n\n<!-- benchmarks demo -->\nnew\n<!-- end of demo -->\n\nafter\n"
    for file, name in (("docs/performance.md", "demo"), ("benchmarks/results.md", "peers")):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text.count(f"<!-- benchmarks {name} -->\n") == text.count(f"<!-- end of {name} -->") == 1


# --- arithmetic ---------------------------------------------------------------------------------------------------
def test_arms_alternate_in_an_order_that_rotates():
    called: list[str] = []

    def arm(name: str, number: int) -> int:
        called.append(name)
        return number

    interleaved({name: partial(arm, name) for name in "ab"}, 3, "x")
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"


def test_a_ratio_is_taken_within_each_round():
    assert paired([{"a": 2, "b": 1}, {"a": 9, "b": 3}, {"a": 1, "b": 2}], "a", "b") == Spread(2, 0.5, 3)
    assert f"{Spread(2, 0.5, 3)}" == "2.00 (0.50 to 3.00)"


def test_a_window_is_compared_position_by_position():
    reference = np.log(np.array([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]], np.float32))
    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], np.float32))
    found = side_by_side.compare(reference, logits, [0, 1, 0])
    kl = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75) + 0.25 * np.log(1 / 3) + 0.75 * np.log(3)) / 3
    assert found["kl_divergence"] == pytest.approx(kl, rel=1e-6)
    assert found["top1_agreement"] == pytest.approx(1 / 3)  # a tie is the first, then
    assert found["cross_entropy"] == pytest.approx(-(np.log(0.5) + np.log(0.25)) / 2, rel=1e-6)


def test_an_answer_counts_up_to_its_end_token():
    window = {"kl_divergence": 0.5, "top1_agreement": 0.9, "cross_entropy": np.log(7)}
    answers, expected = [[5, 2, 8, 8], [5, 6, 7, 8]], [[5, 2, 9, 9], [5, 6, 1, 1]]
    cells = side_by_side.summary([window, window | {"kl_divergence": 0.1}], answers, expected, ends=[2])
    assert cells == ["0.3000", "90.0%", "7.00", "50% (67%)"]
    assert side_by_side.summary([], answers, expected, ends=[2]) == [*[NOT_TOLD] * 3, "50% (67%)"]


def test_an_engine_without_drafts_is_not_compared_with_one_that_has_them():
    engines = [
        Engine("ours", "ours", "pastkey-int8", drafts=True),
        Engine("steps", "steps", "pastkey-int8"),
        Engine("peer", "peer", "genai-int8", rival=True),
        Engine("lookup", "lookup", "openvino-int8", rival=True, drafts=True),
    ]
    prepared = [Prepared(one, Path(), Path(), 1, {}, "") for one in engines]
    speed = {"ours": 6.0, "steps": 3.0, "peer": 2.0, "lookup": 4.0}
    rounds = [{name: {"prefill": 1.0, "decode": decode} for name, decode in speed.items()}]
    (table,) = side_by_side.ratios(prepared, {side_by_side.Shape(5, 1): rounds})
    assert [row[2].split()[0] for row in table.rows] == ["1.50", "1.50", "1.00", "1.00"]
    assert not [*side_by_side.ratios(prepared[:2], {})]


def test_a_request_is_whole_rejected_or_lost():
    whole, lost = [Reply(200, 8, 0.1, 0.5), Reply(200, 8, 0.3, 0.9)], [Reply(0, 0, 0, 0), Reply(200, 0, 0, 1)]
    expected = {"throughput": 8.0, "rejected": 1, "lost": 2, "first": 0.2, "first99": 0.3, "last99": 0.9}
    assert Served([*whole, Reply(429, 0, 0, 0), *lost], 2.0).figures.items() >= expected.items()
    assert [percentile(range(1, 101), share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]


# --- texts, the store and the workers -----------------------------------------------------------------------------
def test_a_text_is_cut_into_windows_and_one_that_is_too_short_is_refused(folder, tmp_path):
    bundle, file = open_bundle(folder / "tiny"), tmp_path / "text.txt"
    once = partial(Store(tmp_path / "work").once, key=1)
    file.write_text("a" * 2000)
    found = open_text(file, bundle, 1, once, own=1, most=3)
    assert [len(window) for window in found.windows] == [512] * 3
    file.write_text("a" * 510)
    with pytest.raises(InputError, match="has 510 tokens; one window of 512 tokens is needed"):
        open_text(file, bundle, 1, once, own=1, most=3)


def test_a_step_is_done_again_for_another_key_and_for_a_lost_product(tmp_path):
    made, product = iter(range(9)), tmp_path / "product"
    step: Callable[[], int] = lambda: next(made)  # noqa: E731
    store = Store(tmp_path / "work")
    assert [store.once("a", step, key=key) for key in (1, 1, 2, 2)] == [0, 0, 1, 1]
    assert [store.once("b", step, key=1, product=product) for _ in range(2)] == [2, 3]
    product.touch()
    assert store.once("b", step, key=1, product=product) == 3
    assert digest_of_files(product) != digest_of_files(tmp_path / "work")


def test_a_gguf_is_said_to_have_a_longer_context_and_its_source_stays(tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(1000)
    writer.add_tensor("x", np.ones((2, 2), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    source, store = Source(file, digest_of_files(file), "a"), Store(tmp_path / "work")
    assert with_context(source, 1000, store) == (source, store)
    longer, _ = with_context(source, 1001, store)
    read = {one: gguf.GGUFReader(one.path).fields["llama.context_length"].contents() for one in (source, longer)}
    assert list(read.values()) == [1000, 1024]
    assert (longer.name, longer.content != source.content) == ("a, said to have a context of 1024", True)


@pytest.mark.parametrize("engine", [*ENGINES[:2], *STREAM_ENGINES[:2]], ids=lambda engine: engine.name)
def test_the_worker_of_pastkey_answers_as_its_model_does(engine, folder, tmp_path):
    prompts: Sequence[list[int]] = [[1, 2, 3, 1, 2], [7, 8], [9] * 20]
    with load(folder / "tiny", threads=1) as lm:
        expected = [lm.generate(prompt, max_new_tokens=12).ids for prompt in prompts]
    with Worker(of_bundle(engine, folder / "tiny"), threads=1, context=600, logs=tmp_path) as worker:
        if engine in STREAM_ENGINES:
            assert worker.ask("streams", prompts=prompts, new_tokens=12)["ids"] == expected
            return
        assert [worker.ask("generate", ids=ids, new_tokens=12)["ids"] for ids in prompts] == expected
        worker.ask("logits", ids=prompts[0], out=str(tmp_path / "l.npy"))
        assert worker.ask("memory")["peak_rss_bytes"] > 1 << 20
    whole = Session(open_bundle(folder / "tiny"), graph="all_logits", threads=1).forward([prompts[0]])[0]
    assert np.array_equal(np.load(tmp_path / "l.npy"), whole)


def test_a_worker_that_dies_is_named_with_its_log(tmp_path):
    one = Prepared(ENGINES[0], Path(sys.executable), tmp_path / "nothing", 1, {}, "")
    sentence = r"pastkey int8 ended with exit status 1: see run-pastkey-int8\.log"
    with Worker(one, threads=1, context=40, logs=tmp_path) as worker, pytest.raises(BenchmarkError, match=sentence):
        worker.start()
    assert "does not exist" in (tmp_path / "run-pastkey-int8.log").read_text()
