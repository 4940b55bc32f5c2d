"""benchmarks/embedding.py without any other engine, on a tiny decoder; and its page, of made-up figures."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import constrained, embedding
from benchmarks.peers import quality, serving
from benchmarks.peers.engines import Prepared, Worker
from benchmarks.peers.speed import Ratio
from benchmarks.peers.store import Store
from pastkey.runtime import LanguageModel, load

from .runtime import conftest as decoder
from .runtime.constraints import vocabularies

OWN, STEPS = serving.ENGINES[:2]
TEXT = quality.Text("a text", tuple(tuple(range(i, i + 30)) for i in range(0, 90, 30)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights that takes any text."""
    tokenizer = vocabularies.byte_level()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "V", tokenizer.get_vocab_size())
        tiny = decoder.Tiny.random([(8, 8)], context_length=600)
        return decoder.write_bundle(tmp_path_factory.mktemp("b") / "b", tiny, "fused", tokenizer=tokenizer).path


@pytest.fixture(scope="module")
def lm(bundle: Path) -> LanguageModel:
    return load(bundle, threads=1)


def prepared(engine: serving.Engine, bundle: Path) -> Prepared:
    return Prepared(engine, Path(sys.executable), bundle, 1, {"pastkey": "1"}, engine.name)


# --- streams ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", [OWN, STEPS], ids=lambda engine: engine.name)
def test_the_worker_streams_what_the_model_generates(
    engine: serving.Engine, bundle: Path, lm: LanguageModel, tmp_path: Path
) -> None:
    prompts = [[1, 2, 3, 1, 2], [7, 8], [9] * 20]
    with Worker(prepared(engine, bundle), threads=1, context=600, logs=tmp_path) as worker:
        reply = worker.ask("streams", prompts=prompts, new_tokens=12)
    assert reply["ids"] == [lm.generate(prompt, max_new_tokens=12).ids for prompt in prompts]
    assert len(reply["first_seconds"]) == 3
    assert all(0 < first < last for first, last in zip(reply["first_seconds"], reply["last_seconds"], strict=True))


def test_streams_are_served_in_every_round_and_then_remembered(bundle: Path, tmp_path: Path) -> None:
    prompts = [TEXT.prompt(10, first=number) for number in range(3)]
    for model in (bundle, tmp_path / "nothing"):
        both = [dataclasses.replace(prepared(engine, bundle), model=model) for engine in (OWN, STEPS)]
        store = Store(tmp_path / "work")
        rounds, load_average = serving.race(both, prompts, (1, 3), 2, 1, store, new_tokens=6)
        peaks = serving.measure_memory(both, prompts, (1, 3), 1, store, new_tokens=6)
    assert load_average >= 0
    assert [sorted(one) for one in rounds] == [[STEPS.name, OWN.name]] * 2
    assert [len(served.first) for served in rounds[1][OWN.name].values()] == [1, 3]
    assert 1 << 20 < peaks[OWN.name][1] <= peaks[OWN.name][3]
    found = serving.figures(rounds, STEPS.name, OWN.name, 3)
    assert found.ratio.low <= found.ratio.median <= found.ratio.high
    assert found.first <= found.worst


def test_figures_are_medians_of_the_rounds() -> None:
    fast = serving.Served((1.0, 2.0), (3.0, 4.0), 5)
    slow = serving.Served((2.0, 4.0), (4.0, 8.0), 5)
    assert (fast.throughput, fast.decode) == (10 / 4, 4 / 2)
    rounds = [{"a": {2: fast}, "b": {2: slow}}, {"a": {2: fast}, "b": {2: fast}}, {"a": {2: fast}, "b": {2: slow}}]
    found = serving.figures(rounds, "b", "a", 2)
    assert found == serving.Figures(10 / 8, (4 / 2 + 4 / 4) / 2, 3.0, 4.0, Ratio(2.0, 1.0, 2.0))


# --- pastkey alone ------------------------------------------------------------------------------------------------
def test_a_step_is_divided_into_onnxruntime_and_the_rest(lm: LanguageModel) -> None:
    run = lm.require_open().graph.onnx.run_with_iobinding
    cost = embedding.own_cost(lm, [1, 2, 3], rounds=1, tokens=5)
    assert len(cost) == len(embedding.SETTINGS) > 5
    assert all(us > 0 and 0 < share < 1 for us, share in cost)
    assert lm.require_open().graph.onnx.run_with_iobinding == run


def test_the_first_token_comes_of_each_kept_prefix(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "PREFIX", 30)
    monkeypatch.setattr(embedding, "QUESTION", 5)
    assert all(seconds > 0 for seconds in embedding.prefixes(lm, TEXT, rounds=2))


def test_constrained_texts_are_compared_with_free_ones(lm: LanguageModel) -> None:
    pytest.importorskip("llguidance")
    whole, compared = constrained.measure(lm, rounds=2)
    assert 0 < whole.forced_tokens < whole.new_tokens
    assert [len(found) for found in compared.values()] == [2, 2, 2]


# --- the page -----------------------------------------------------------------------------------------------------
def table(engines: tuple[serving.Engine, ...] = serving.ENGINES) -> serving.Table:
    """Made-up figures."""
    return {
        engine.title: {
            count: serving.Figures(100.0 * count / place, 50 / place, 0.1, 0.2 * place, Ratio(place, place, place))
            for count in serving.STREAMS
        }
        for place, engine in enumerate(engines, 1)
    }


def test_the_tables_have_a_line_for_each_engine() -> None:
    peaks = {engine.title: dict.fromkeys(serving.STREAMS, 300 << 20) for engine in serving.ENGINES}
    text = serving.tables(table(), peaks)
    assert text.count("| pastkey int8 | ") == 3  # none in the table that compares with it
    assert "| pastkey int8 | 100 (50) | 200 (50) | 400 (50) | 800 (50) | 1.6e+03 (50) |" in text
    assert text.count("| llama-cpp-python Q8_0 | ") == 4
    assert "| llama-cpp-python Q8_0 | 5.00 (5.00 to 5.00) |" in text
    assert "in the same round" not in serving.tables(table((OWN,)), peaks)


def test_the_chart_shows_two_panels(tmp_path: Path) -> None:
    serving.draw(table(), {engine.title: engine.runtime for engine in serving.ENGINES}, tmp_path / "c.png")
    assert imread(tmp_path / "c.png").std() > 0.01


def test_a_section_is_put_between_the_markers_of_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    embedding.write_page(page, "first\n")
    assert page.read_text() == f"{embedding.BEGIN}\nfirst\n{embedding.END}\n"
    page.write_text(f"before\n\n{page.read_text()}\nafter\n")
    embedding.write_page(page, "second\n")
    assert page.read_text() == f"before\n\n{embedding.BEGIN}\nsecond\n{embedding.END}\n\nafter\n"


def test_the_docs_have_the_markers_once() -> None:
    text = embedding.PAGE.read_text(encoding="utf-8")
    assert text.count(embedding.BEGIN) == text.count(embedding.END) == 1


# --- the command --------------------------------------------------------------------------------------------------
def test_the_command_measures_a_bundle_and_writes_the_page(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(quality, "text_file", lambda given: None)
    monkeypatch.setattr(quality, "windows_of_own", lambda *_: TEXT)
    for name, value in (("STREAMS", (1, 2)), ("PROMPT", 12), ("NEW", 4)):
        monkeypatch.setattr(serving, name, value)
    for name, value in (("PREFIX", 30), ("QUESTION", 5), ("OWN_TOKENS", 4)):
        monkeypatch.setattr(embedding, name, value)
    out = tmp_path / "page.md"
    words = ["--rounds", "1", "--threads", "1", "--work", str(tmp_path / "work"), "--out", str(out)]
    assert embedding.main([str(bundle), "--only", STEPS.name, *words]) == 0
    page = out.read_text(encoding="utf-8")
    assert "| greedy |" in page
    assert f"![tokens per second and the longest wait, by streams]({out.stem}-streams.png)" in page
    assert (tmp_path / "page-streams.png").is_file()
    assert "| pastkey int8 |" in capsys.readouterr().out


def test_a_mistake_is_one_sentence_and_exit_status_2(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "PREFIX", 600)
    work = ["--work", str(tmp_path / "work"), "--only", OWN.name]
    for words, sentence in (
        ([str(bundle), *work], "the context is 600 tokens; at least 621 were expected"),
        (["--only", "vllm"], "no engine 'vllm'; the engines are pastkey-streams, pastkey-step-streams"),
        ([str(tmp_path / "none"), *work], "does not exist"),
    ):
        assert embedding.main(words) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert sentence in told[0]
