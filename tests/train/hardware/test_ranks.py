"""Several processes compute what one does, whichever began the run, and end together."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pastkey.errors import InputError
from pastkey.train import loop
from pastkey.train.checkpoint import load_checkpoint, load_optimizer
from pastkey.train.hardware.ranks import Ranks
from pastkey.train.report import read_metrics

from ..helpers import TINY, flags, tiny, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")]

SIZES: dict[str, Any] = {"batch_size": 6, "accumulate": 2, "layers": 2}
matrix = functools.partial(pytest.param, marks=pytest.mark.matrix)


@pytest.fixture(scope="module")
def start():
    """Starts a training in several processes, and returns the status and standard error of each."""
    command: list[str | Path] = [sys.executable, Path(__file__).parent / "fork_ranks.py"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread) as process:

        def ask(world: int, *flags: object, **more: object) -> list[tuple[int, str]]:
            request = {"world": world, "command": ["train", *map(str, flags)], **more}
            print(json.dumps(request), file=process.stdin, flush=True)
            return [(status, said) for status, said in json.loads(process.stdout.readline())]

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "c"
    loop.train(tiny(**SIZES), out, data=[text])
    return out


def of_run(out: Path, text: Path) -> list[str]:
    return flags(TINY | SIZES | {"out": out, "data": text})


def assert_same_run(out: Path, one: Path) -> None:
    found, expected = read_metrics(out), read_metrics(one)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, its in zip(found, expected, strict=True):
        assert row == pytest.approx(its, rel=2e-5)
    a, b = load_checkpoint(out), load_checkpoint(one)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert load_optimizer(out, a.training).keys() == load_optimizer(one, b.training).keys()


@pytest.mark.parametrize(("world", "more"), [(2, ["--shard"]), (3, []), matrix(2, []), matrix(3, ["--shard"])])
def test_several_processes_compute_what_one_does(world, more, start, text, one, tmp_path):
    answers = start(world, *of_run(tmp_path / "c", text), *more)
    assert [status for status, _ in answers] == [0] * world
    assert f"on {world} processes, each on cpu" in answers[0][1]
    assert {said for _, said in answers[1:]} == {""}
    assert_same_run(tmp_path / "c", one)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("worlds", "shard", "dead"),
    [((2, 1), "--shard", 0), ((1, 2), "--no-shard", 0), ((3, 2), "--no-shard", 1), matrix((3, 2), "--shard", 1)],
)
def test_a_run_that_a_death_ends_is_resumed_with_another_number_of_processes(
    worlds, shard, dead, start, text, one, tmp_path
):
    out = tmp_path / "c"
    began, goes_on = (shard if world > 1 else "--no-shard" for world in worlds)
    answers = start(worlds[0], *of_run(out, text), began, kill=[dead, str(out / "pastkey.json")])
    assert answers.pop(dead)[0] == -9
    assert 0 not in {status for status, _ in answers}
    if dead:  # the first one lives, and says it
        (sentence,) = [line for _, said in answers for line in said.splitlines() if line.startswith("pastkey")]
        step = load_checkpoint(out).training["step"]
        assert sentence.startswith("pastkey train: a process of this run ended or was stopped: ")
        assert f"{out} keeps step {step}, --resume continues from it" in sentence
        assert {status for status, _ in answers} == {2}
    answers = start(worlds[1], "--out", out, "--resume", goes_on)
    assert [status for status, _ in answers] == [0] * worlds[1], answers
    assert_same_run(out, one)


STOPPED = """
import os, signal
from pastkey import __main__ as command
from pastkey.train import loop
from pastkey.train.hardware.ranks import Ranks
def stopped(function):
    def call(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*given, **named)
    return call
loop.LostProcessError = stopped(loop.LostProcessError)
Ranks._fails_first = stopped(Ranks._fails_first)
command._fail = stopped(command._fail)
"""


def test_torchruns_signal_does_not_silence_the_process_that_says_why(start, text, tmp_path):
    answers = start(2, *of_run(tmp_path / "c", text), kill=[1, str(tmp_path / "c" / "pastkey.json")], before=STOPPED)
    assert [status for status, _ in answers] == [2, -9]
    assert answers[0][1].splitlines()[-1].startswith("pastkey train: a process of this run ended or was stopped: ")


FULL = """
from pastkey.train import loop
save = loop.save_checkpoint
def full(folder, model, state, **more):
    if state.step >= 8:
        raise OSError(28, "No space left on device", str(folder))
    save(folder, model, state, **more)
loop.save_checkpoint = full
"""


def test_a_full_disk_ends_all_processes_with_one_sentence(start, text, tmp_path):
    answers = start(2, *of_run(tmp_path / "c", text), before=FULL)
    assert [status for status, _ in answers] == [2, 2]
    assert "pastkey train: the disk is full" in answers[0][1]
    assert answers[1][1] == ""
    assert load_checkpoint(tmp_path / "c").training["step"] == 4


def test_a_mistake_is_one_sentence_of_one_process(start, text, tmp_path):
    answers = start(3, *of_run(tmp_path / "c", text), "--batch-size", "8")
    assert [status for status, _ in answers] == [2, 2, 2]
    (line,) = "".join(said for _, said in answers).splitlines()
    assert "a batch of 8 rows is not divided evenly among 3 processes: start 2, or begin a run" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix
def test_processes_that_the_command_starts_end_with_a_sentence_and_no_trace(text, tmp_path):
    out = tmp_path / "c"
    command = [sys.executable, "-m", "pastkey", "train", "--processes", "2", *of_run(out, text)]
    process = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    while not (out / "pastkey.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert "Traceback" not in said
    assert f"pastkey train: a process of this run ended or was stopped: {out} keeps step " in said
    assert said.endswith("of 2 was ended by signal 9\n")


def test_the_advice_for_a_batch_that_is_not_divided_is_right():
    with pytest.raises(InputError, match=r"a batch of 12 rows .* among 5 processes: start 2 or 3 or 4, or begin"):
        Ranks(0, 5).require_divides(12)
    with pytest.raises(InputError, match="among 2 processes: start 1, or begin a run whose --batch-size is a multiple"):
        Ranks(0, 2).require_divides(7)
