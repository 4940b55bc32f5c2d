"""The folder of a run: at its name from the first save on, nobody else's while it trains, whole after a signal."""

from __future__ import annotations

import functools
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pastkey.errors import InUseError
from pastkey.files.durable import refuse_existing
from pastkey.train import loop
from pastkey.train.checkpoint import load_checkpoint

from .helpers import TINY, before_step, files, flags, tiny


def state(folder: Path) -> tuple[int, int]:
    """Seed and step of a checkpoint."""
    training = load_checkpoint(folder).training
    return training["settings"]["seed"], training["step"]


@pytest.fixture
def old(copy, tmp_path):
    """A finished run of seed 0, the only one in its folder."""
    (tmp_path / "place").mkdir()
    return copy.rename(tmp_path / "place" / "c")


@pytest.mark.parametrize("force", [False, True])
def test_a_run_is_at_its_name_from_its_first_save_on(force, old, text, monkeypatch):
    out = old if force else old.with_name("d")
    before, seen = files(old), dict[int, tuple[int, int] | None]()

    def look(step: int) -> None:
        seen[step] = state(out) if out.exists() else None
        assert step >= 4 or files(old) == before

    for step in range(12):
        before_step(monkeypatch, step, functools.partial(look, step))
    assert loop.train(tiny(seed=1), out, data=[text], force=force)["checkpoint"] == str(out)
    first = (0, 12) if force else None
    assert seen == dict.fromkeys(range(4), first) | {step: (1, step // 4 * 4) for step in range(4, 12)}
    assert {path.name for path in out.parent.iterdir()} == {"c", out.name}


@pytest.mark.parametrize(("at", "error"), [(3, KeyboardInterrupt), (5, ValueError)])
def test_a_run_that_ends_early_leaves_the_old_one_or_what_it_saved(at, error, old, text, monkeypatch):
    def end() -> None:
        raise error

    before = files(old)
    before_step(monkeypatch, at, end)
    with pytest.raises(error):
        loop.train(tiny(seed=1), old, data=[text], force=True)
    assert list(old.parent.iterdir()) == [old]
    assert files(old) == before if at < 4 else state(old) == (1, 4)


def test_while_a_run_trains_nobody_else_trains_there_or_replaces_it(old, text, monkeypatch):
    refused = []

    def others() -> None:
        monkeypatch.undo()
        for attempt in (
            lambda: loop.resume(old, {"steps": 20}),
            lambda: loop.train(tiny(), old, data=[text], force=True),
            lambda: refuse_existing(old, force=True),  # as an export does
        ):
            with pytest.raises(InUseError, match=r"c is being written by another process: wait for its end"):
                attempt()
            refused.append(attempt)

    before_step(monkeypatch, 13, others)
    loop.resume(old, {"steps": 14})
    before_step(monkeypatch, 5, others)
    loop.train(tiny(seed=1, steps=6), old, data=[text], force=True)
    assert len(refused) == 6


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("saved", "number", "status"),
    [
        pytest.param(saved, *row, marks=() if saved and row == SIGNALS[0] else pytest.mark.matrix)
        for saved, row in itertools.product((False, True), SIGNALS)
    ],
)
def test_signals_leave_the_old_one_or_what_was_saved(saved, number, status, old, text):
    before = files(old)
    given = TINY | {"seed": 1, "steps": 1000000, "save_every": 20 if saved else 100000}

    def heed() -> None:
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    command = [sys.executable, "-m", "pastkey", "train", "--out", old, "--data", text, "--force", *flags(given)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    with process:
        try:
            while state(old)[0] == 0 if saved else not [*old.parent.glob(".c.*.partial/metrics.jsonl")]:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            told = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == status
    assert "Traceback" not in told
    assert list(old.parent.iterdir()) == [old]
    assert state(old) >= (1, 20) if saved else files(old) == before
