"""benchmarks/peers without any peer: what is stored, computed and drawn, and pastkey's own worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks import memory
from benchmarks.environments import ROOT
from benchmarks.peers import __main__ as peers
from benchmarks.peers import chart, quality, results, scaling, speed
from benchmarks.peers.engines import ENGINES, REFERENCE, EngineError, Prepared, Worker
from benchmarks.peers.store import Store, digest_of_files
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.export import export
from pastkey.runtime import Engine
from pastkey.train.model import Decoder

from .export.decoders import llama

BY_NAME = {engine.name: engine for engine in ENGINES}


# --- the store ----------------------------------------------------------------------------------------------------
def counted(results: Sequence[object]) -> Callable[[], object]:
    """A step that gives each of these in turn, so that a step done twice shows."""
    left = iter(results)
    return lambda: next(left)


def test_a_finished_step_is_not_done_again(tmp_path: Path) -> None:
    step = counted([{"seconds": [1.5]}])
    first = Store(tmp_path / "work").once("a", {"threads": 2}, step)
    again = Store(tmp_path / "work").once("a", {"threads": 2}, step)
    assert first == again == {"seconds": [1.5]}


def test_a_step_is_done_again_under_another_key(tmp_path: Path) -> None:
    store, step = Store(tmp_path / "work"), counted([1, 2])
    assert [store.once("a", {"threads": n}, step) for n in (1, 2, 2)] == [1, 2, 2]


def test_a_step_is_done_again_when_what_it_made_is_gone(tmp_path: Path) -> None:
    store, step, product = Store(tmp_path / "work"), counted([1, 2]), tmp_path / "product"
    assert store.once("a", {}, step, product=product) == 1
    assert store.once("a", {}, step, product=product) == 2
    product.touch()
    assert store.once("a", {}, step, product=product) == 2


def test_a_step_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "work")
    with pytest.raises(EngineError):
        store.once("a", {}, lambda: (_ for _ in ()).throw(EngineError("no")))
    assert store.once("a", {}, lambda: 1) == 1


def test_fresh_forgets_all_steps(tmp_path: Path) -> None:
    step = counted([1, 2])
    assert [Store(tmp_path / "work", fresh=fresh).once("a", {}, step) for fresh in (False, True)] == [1, 2]


def test_a_folder_with_other_things_is_no_work_folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match="holds other things"):
        Store(tmp_path, fresh=True)
    assert (tmp_path / "models").is_dir()


def test_the_digest_of_a_folder_tells_contents_and_names_apart(tmp_path: Path) -> None:
    found = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        folder = tmp_path / f"{name}{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        found.add(digest_of_files(folder))
    assert len(found) == 3


# --- figures ------------------------------------------------------------------------------------------------------
def test_a_ratio_is_taken_to_the_fastest_rival_of_its_own_round() -> None:
    rounds = [
        {"mine": {512: speed.Speed(1, mine)}, "a": {512: speed.Speed(1, a)}, "b": {512: speed.Speed(1, b)}}
        for mine, a, b in ((100, 50, 100), (10, 20, 5), (90, 30, 20))
    ]
    assert speed.ratio(rounds, "mine", ["a", "b"], 512, "decode") == speed.Ratio(1.0, 0.5, 3.0)
    assert speed.median_speed(rounds, "mine", 512) == speed.Speed(1, 90)


def test_a_window_is_compared_position_by_position() -> None:
    reference = np.log(np.array([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]], np.float32))
    logits = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], np.float32))
    found = quality.compare(reference, logits, [0, 1, 0])
    kl = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75) + 0.25 * np.log(1 / 3) + 0.75 * np.log(3)) / 3
    assert found["kl_divergence"] == pytest.approx(kl, rel=1e-6)
    assert found["top1_agreement"] == pytest.approx(1 / 3)  # a tie is the first, then
    assert found["cross_entropy"] == pytest.approx(-(np.log(0.5) + np.log(0.25)) / 2, rel=1e-6)


def test_a_long_window_is_compared_in_parts_of_it() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 150, 7)).astype(np.float32)
    ids = rng.integers(0, 7, 150).tolist()
    logp = b - np.log(np.exp(b).sum(-1, keepdims=True))
    expected = -np.mean([logp[i, ids[i + 1]] for i in range(149)])
    assert quality.compare(a, b, ids)["cross_entropy"] == pytest.approx(expected, rel=1e-5)


def test_an_answer_counts_up_to_its_end_token() -> None:
    window = {"kl_divergence": 0.5, "top1_agreement": 0.9, "cross_entropy": np.log(7)}
    found = quality.summary(
        windows=[window, window | {"kl_divergence": 1.5}],
        answers=[[5, 2, 8, 8], [5, 6, 7, 8]],
        expected=[[5, 2, 9, 9], [5, 6, 1, 1]],
        ends=[2],
    )
    assert found.kl_divergence == 1
    assert found.perplexity == pytest.approx(7)
    assert found.equal_answers == 0.5
    assert found.equal_tokens == 4 / 6


def test_an_engine_that_is_asked_for_twice_is_measured_once() -> None:
    chosen = peers._chosen(["genai-int8", "pastkey-fp32", "genai-int8"], full=False)
    assert [engine.name for engine in chosen] == ["pastkey-fp32", "genai-int8"]


def test_a_prompt_goes_round_where_the_text_is_short() -> None:
    text = quality.Text("", ((1, 2), (3, 4)))
    assert text.tokens == 4
    with pytest.raises(AssertionError):
        text.prompt(5)
    assert [text.prompt(3, first=number) for number in (1, 2)] == [[3, 4, 1], [1, 2, 3]]


def test_there_are_enough_questions() -> None:
    assert len(set(quality.QUESTIONS)) >= 25


# --- results ------------------------------------------------------------------------------------------------------
def row(name: str, divergence: float, decode: float, size: int) -> results.Row:
    """Made-up figures of an engine."""
    return results.Row(
        engine=BY_NAME[name],
        versions={"program": "1.2.3"},
        size=size,
        quality=quality.Quality(divergence, 0.96, 18.5, 0.8, 0.9),
        speeds={512: speed.Speed(700, decode)},
        ratios={(512, phase): speed.Ratio(decode / 100, decode / 110, decode / 90) for phase in ("prefill", "decode")},
        load=speed.Load(0.5, 0.25),
        peak_bytes=300 << 20,
    )


ROWS = [
    row("pastkey-int8", 0.0023, 118, 154_000_000),
    row("pastkey-fp32", 0.0, 40, 540_000_000),
    row("genai-int8", 0.0044, 114, 267_000_000),
    row("llama-q8_0", 0.0041, 112, 145_000_000),
    row("pastkey-int4", 0.21, 128, 80_000_000),
    row("genai-int4", 0.366, 123, 86_000_000),
    row("llama-q4_0", 0.277, 122, 92_000_000),
    row("optimum-fp32", 1e-9, 25, 652_000_000),
    row("optimum-int8", 1.45, 15.6, 166_000_000),
    row("transformers-fp32", 2e-9, 17, 538_000_000),
]
SETTINGS = results.Settings("a model", "a.txt", 6, 11, 11, 2, "python -m benchmarks.peers")


def test_the_page_has_every_figure_with_its_unit() -> None:
    page = results.page(ROWS, {"llama.cpp Q4_0": "it is raining"}, SETTINGS, "results.png")
    lines = page.splitlines()
    head = next(line for line in lines if line.startswith("| engine | MB"))
    mine = next(line for line in lines if line.startswith("| pastkey int8"))
    assert head.count("|") == mine.count("|")
    cells = [cell.strip() for cell in mine.strip("|").split("|")]
    assert cells == [
        "pastkey int8", "154", "0.0023", "96.0%", "18.50", "80% (90%)", "700", "118.0", "300", "0.50 (0.25)",
    ]  # fmt: skip
    assert "| pastkey int8 | 1.18 (1.07 to 1.31) | 1.18 (1.07 to 1.31) |" in lines
    assert "- llama.cpp Q4_0: it is raining" in lines
    assert "- program 1.2.3: pastkey int8 by pastkey export --precision int8; pastkey fp32 by" in page
    assert "| transformers eager fp32 | 538 | 0 |" in page


def test_the_page_does_without_peers() -> None:
    alone = [results.Row(**(vars(one) | {"ratios": {}})) for one in ROWS[:2]]
    page = results.page(alone, {}, SETTINGS, "results.png")
    assert "results.png" not in page
    assert "Not measured" not in page


def test_the_chart_shows_every_engine_in_its_colour(tmp_path: Path) -> None:
    chart.draw(ROWS, tmp_path / "chart.png")
    picture = imread(tmp_path / "chart.png")[..., :3]
    for runtime, color in chart.COLORS.items():
        wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(picture - wanted).max(-1) < 0.02).any(), runtime


def test_the_labels_of_the_chart_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(chart, "_label", lambda figure, dots, real=chart._label: figures.append(real(figure, dots)))
    chart.draw(ROWS, tmp_path / "chart.png")
    (boxes,) = figures
    assert len(boxes) == len(ROWS)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


# --- pastkey's worker ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A tiny decoder as the worker gets it."""
    out = tmp_path_factory.mktemp("worker") / "bundle"
    export(llama(), out, precision="fp32", context_length=40)
    return Prepared(REFERENCE, Path(sys.executable), out, 1, {}, "tiny")


def test_the_worker_of_pastkey_answers_as_its_session_does(prepared: Prepared, tmp_path: Path) -> None:
    ids = [3, 1, 4, 1, 5]
    session, expected = Engine(open_bundle(prepared.model), threads=1), []
    logits = session.prefill(ids)
    for _ in range(6):
        expected.append(int(logits.argmax()))
        logits = session.decode(expected[-1])
    with Worker(prepared, threads=1, context=40, logs=tmp_path) as worker:
        answer = worker.ask("generate", ids=ids, new_tokens=6)
        assert worker.ask("logits", ids=ids, out=str(tmp_path / "l.npy")) == {}
        assert worker.ask("memory")["peak_rss_bytes"] > 1 << 20
    assert answer["ids"] == expected
    assert min(answer["prefill_seconds"], answer["decode_seconds"], worker.load_seconds) > 0
    whole = Engine(open_bundle(prepared.model), graph="all_logits", threads=1).forward([ids])[0]
    assert np.array_equal(np.load(tmp_path / "l.npy"), whole)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_the_memory_of_a_prompt_is_told_beside_its_cache(
    prepared: Prepared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory", str(prepared.model), "--lengths", "8", "20", "--new-tokens", "3"])
    memory.main()
    _, *told = capsys.readouterr().out.splitlines()
    assert [line.split(" tokens: ")[0].strip() for line in told] == ["8", "20"]
    assert all(10 < int(line.split(": ")[1].split(",")[0]) < 2000 for line in told)


def test_quality_and_speed_are_measured_by_workers_and_then_remembered(prepared: Prepared, tmp_path: Path) -> None:
    store = Store(tmp_path / "work")
    text = quality.Text("", (tuple(range(20)), tuple(range(20, 40))))
    shape = speed.Shape(8, 4)
    for attempt in ("measured", "remembered"):
        model = prepared.model if attempt == "measured" else tmp_path / "nothing"
        one = Prepared(prepared.engine, prepared.python, model, 1, {}, prepared.identity)
        with Worker(one, threads=1, context=40, logs=store.logs) as worker:
            windows = quality.measure_windows([worker], [one], text, 1, store)
            answers = quality.measure_answers([worker], [one], [[1, 2]], 1, store)
            rounds = speed.race([worker], [one], text, [shape], 2, 1, store)
    assert [window["kl_divergence"] for window in windows["pastkey-fp32"]] == [0, 0]
    assert [len(answer) for answer in answers["pastkey-fp32"]] == [quality.ANSWER]
    assert len(rounds) == 2
    assert speed.ratio(rounds, "pastkey-fp32", ["pastkey-fp32"], 8, "decode").median == 1


def test_without_a_text_the_model_writes_one_once(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "WINDOW", 16)
    bundle, store = open_bundle(prepared.model), Store(tmp_path / "work")
    first = quality.windows_of_own(bundle, "tiny", 2, 1, store)
    assert [len(window) for window in first.windows] == [16, 16]
    assert first.windows[0] != first.windows[1]
    assert "wrote itself" in first.name
    monkeypatch.setattr(quality, "self_generated_texts", None)
    assert quality.windows_of_own(bundle, "tiny", 2, 1, store) == first


def test_a_worker_that_dies_is_named_with_its_log(tmp_path: Path) -> None:
    engine = BY_NAME["pastkey-int8"]
    one = Prepared(engine, Path(sys.executable), tmp_path / "nothing", 1, {}, "")
    sentence = r"pastkey int8 ended with exit status 1: see run-pastkey-int8\.log"
    with Worker(one, threads=1, context=40, logs=tmp_path) as worker, pytest.raises(EngineError, match=sentence):
        worker.start()
    assert "does not exist" in (tmp_path / "run-pastkey-int8.log").read_text()


# --- the command --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nothing.gguf"], "no such model: nothing.gguf does not exist"),
        (["--model", "short.txt"], "short.txt is neither a .gguf file nor a folder"),
        (["--text", "nothing.txt"], "no such text: nothing.txt is not a file"),
        (["--text", "short.txt"], "short.txt has 5 bytes; one window of 512 tokens is needed"),
        (["--only", "vllm"], "no engine 'vllm'; the engines are pastkey-int8, pastkey-int8-steps, pastkey-fp32"),
        (["--rounds", "0"], "0 is not a whole number from 1"),
        (["--threads", "9999"], "--threads is 9999; this machine has"),
        (["--text", "binary.txt"], "binary.txt is not UTF-8 text"),
        (
            ["--model", "empty.gguf", "--out", "short.txt"],
            "short.txt cannot be made a folder (File exists): give another --out",
        ),
        (
            ["--model", "empty.gguf", "--work", "short.txt"],
            "short.txt holds other things: give an empty or a new folder",
        ),
        (["--model", "empty.gguf", "--work", "short.txt/x"], "cannot be made a folder (Not a directory): give another"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff" * 1000)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--work", tmp_path / "work", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], True),
        (["--full"], True),
        (["--rounds", "1"], False),
        (["--threads", "1"], False),
        (["--only", "pastkey-int8"], False),
        (["--model", "other.gguf"], False),
        (["--text", "mine.txt"], False),
    ],
)
def test_a_trial_leaves_the_repositorys_results_alone(arguments: list[str], kept: bool) -> None:
    assert peers._default(peers._parse(arguments)) == kept


def test_a_text_of_fewer_tokens_than_a_window_is_refused(tmp_path: Path, word_codec: quality.TextCodec) -> None:
    file = tmp_path / "text.txt"
    file.write_text("w1 " * 511)
    with pytest.raises(InputError, match="has 511 tokens; one window of 512 tokens is needed"):
        quality.windows_of_file(file, word_codec, 6)
    file.write_text("w1 w2 " * 700)
    text = quality.windows_of_file(file, word_codec, 6)
    assert [len(window) for window in text.windows] == [512, 512]
    assert text.windows[1][:2] == (1, 2)


@pytest.fixture
def word_codec(tmp_path: Path) -> quality.TextCodec:
    """A token for each of a few words."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(9)}, "unk_token": "w0"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return quality.TextCodec.from_file(tmp_path / "tokenizer.json")


# --- scaling ------------------------------------------------------------------------------------------------------
def test_a_curve_is_measured_in_every_round_and_drawn(prepared: Prepared, tmp_path: Path) -> None:
    session = Engine(open_bundle(prepared.model), threads=1)
    points = {length: lambda length=length: scaling.after(session, length, 4) for length in (2, 30)}
    curve = scaling.curve("context", "One token", "tokens", "ms", points, {}, Store(tmp_path / "work"))
    assert list(curve.points) == [2, 30]
    assert all(0 < low <= median <= high for median, low, high in curve.points.values())
    assert len(list((tmp_path / "work" / "steps").glob("scaling-context-30-*.json"))) == scaling.ROUNDS
    scaling.draw(curve, tmp_path / "chart.png")
    assert imread(tmp_path / "chart.png").std() > 0


def test_a_step_of_several_rows_is_timed(prepared: Prepared) -> None:
    session = Engine(open_bundle(prepared.model), threads=1)
    assert scaling.together(session, rows=3, past=8, new=4) > 0
    assert session.length == 12


def test_random_models_grow_from_one_million_parameters_to_five_hundred() -> None:
    counts = [scaling.parameters(*size) for size in scaling.SIZES]
    assert counts == sorted(counts)
    assert counts[0] == pytest.approx(1e6, rel=0.2)
    assert counts[-1] == pytest.approx(5e8, rel=0.1)


def test_parameters_are_counted_as_torch_counts_them() -> None:
    width, layers = scaling.SIZES[1]
    model = Decoder(scaling.configuration(width, layers))
    matrices = {id(p): p.numel() for p in model.parameters() if p.ndim == 2}
    assert sum(matrices.values()) == scaling.parameters(width, layers)


def test_a_random_model_is_exported_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "VOCAB", 64)
    assert scaling.main(["64", "1", str(tmp_path / "made")]) == 0
    assert open_bundle(tmp_path / "made").manifest.precision == "int8"
    assert scaling.main(["64", "1", str(tmp_path / "made")]) == 1
    assert "exists" in capsys.readouterr().err
