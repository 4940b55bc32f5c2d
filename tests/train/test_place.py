"""The old checkpoint or the new one stands at its name, one process trains into it, and what is left is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pastkey import replace
from pastkey.__main__ import main
from pastkey.errors import ExistingFolderError, InUseError, ResourceError
from pastkey.folder import refuse_existing
from pastkey.train import loop, place
from pastkey.train.checkpoint import load_checkpoint
from pastkey.train.settings import TrainConfig

from .helpers import TINY, tiny, write_corpus

Files = dict[Path, bytes]


def files(folder: Path) -> Files:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def seed(folder: Path) -> int:
    found = load_checkpoint(folder).training
    return int(found["settings"]["seed"])


def step(folder: Path) -> int:
    return int(load_checkpoint(folder).training["step"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "text.txt")


@pytest.fixture
def out(text: Path, tmp_path: Path) -> Path:
    """The old checkpoint, of seed 0."""
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "c"
    loop.train(tiny(steps=2), out, data=[text])
    return out


def beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


def when(monkeypatch: pytest.MonkeyPatch, at: int, happens: Any) -> None:
    """Lets something happen before the step after step `at`."""
    original = loop.Run._one_step

    def stepping(run: loop.Run) -> dict[str, Any]:
        if run.step == at:
            happens()
        return original(run)

    monkeypatch.setattr(loop.Run, "_one_step", stepping)


class Killed(BaseException):
    """Stands for SIGKILL: see `killed`."""


def killed(out: Path, text: Path, at: int, monkeypatch: pytest.MonkeyPatch, config: TrainConfig | None = None) -> None:
    """A run with --force and seed 1 that dies after so many steps, and cleans nothing up."""

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        when(patch, at, die)
        patch.setattr(place.Place, "end", lambda self, **_: None)
        with pytest.raises(Killed):
            loop.train(config or tiny(seed=1), out, data=[text], force=True)


def test_until_the_first_save_the_old_one_stands_at_its_name_and_then_the_new(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, seen = files(out), dict[int, tuple[int, int, int]]()
    original = loop.Run._one_step

    def looking(run: loop.Run) -> dict[str, Any]:
        training = out.with_name("c.training")
        if run.step < 4:
            assert {name: content for name, content in files(out).items() if name != Path("training/lock")} == old
        seen[run.step] = seed(out), step(out), seed(training)
        return original(run)

    monkeypatch.setattr(loop.Run, "_one_step", looking)
    figures = loop.train(tiny(seed=1), out, data=[text], force=True)
    assert figures["checkpoint"] == str(out)
    assert seen == dict.fromkeys(range(4), (0, 2, 1)) | {n: (1, n // 4 * 4, 0) for n in range(4, 12)}
    assert beside(out) == {"c"}
    monkeypatch.undo()
    fresh = out.with_name("fresh")
    loop.train(tiny(seed=1), fresh, data=[text])
    assert set(files(out)) == set(files(fresh))
    same = {name for name in files(out) if name.name not in ("pastkey.json", "loss.png")}
    assert {name: files(out)[name] for name in same} == {name: files(fresh)[name] for name in same}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("at", [3, 5])
def test_a_run_that_ends_early_leaves_the_old_one_or_what_it_saved(
    at: int, error: type[BaseException], out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = files(out)

    def end() -> None:
        raise error

    when(monkeypatch, at, end)
    with pytest.raises(error):
        loop.train(tiny(seed=1), out, data=[text], force=True)
    assert beside(out) == {"c"}
    if at < 4:
        assert files(out) == old
    else:
        assert (seed(out), step(out)) == (1, 4)
        monkeypatch.undo()
        loop.resume(out, {})


def test_a_run_killed_before_its_first_save_can_be_resumed_beside_the_old_one(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = files(out)
    killed(out, text, 3, monkeypatch)
    assert beside(out) == {"c", "c.training"}
    assert files(out) == old
    training = out.with_name("c.training")
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert f"{training} is a run at step 0, which was to replace {out}: go on with it by" in capsys.readouterr().err
    loop.resume(training, {})
    assert (seed(training), step(training), seed(out)) == (1, 12, 0)


def test_a_run_killed_after_its_first_save_is_resumed_at_the_name_and_then_the_old_one_goes(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = files(out)
    killed(out, text, 5, monkeypatch)
    assert (seed(out), step(out)) == (1, 4)
    assert files(out.with_name("c.training")) == old
    with pytest.raises(
        ExistingFolderError, match=r"is what the unfinished run in .* replaces, and goes when that ends"
    ):
        loop.train(tiny(seed=2), out, data=[text], force=True)
    with pytest.raises(ValueError, match="started with"):
        loop.resume(out, {"seed": 3})
    assert files(out.with_name("c.training")) == old
    loop.resume(out, {})
    assert beside(out) == {"c"}
    assert (seed(out), step(out)) == (1, 12)
    assert not (out / "training" / "replaces.json").exists()


def test_what_a_killed_run_left_at_step_0_is_told_when_the_next_takes_its_place(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(out, text, 3, monkeypatch)
    loop.train(tiny(seed=2), out, data=[text], force=True)
    assert "c.training is what a killed run left at step 0" in capsys.readouterr().err
    assert beside(out) == {"c"}
    assert seed(out) == 2


@pytest.mark.parametrize("kind", ["photos", "file", "trained"])
def test_what_another_left_beside_is_never_removed(kind: str, out: Path, text: Path) -> None:
    other = out.with_name("c.training")
    if kind == "trained":
        shutil.copytree(out, other)
    elif kind == "photos":
        other.mkdir()
        (other / "1.png").write_text("photo")
    else:
        other.write_text("mine")
    with pytest.raises(ExistingFolderError, match=r"c\.training is .*or rename or remove it, and begin again"):
        loop.train(tiny(seed=1), out, data=[text], force=True)
    assert other.exists()
    assert seed(out) == 0


def test_a_folder_that_cannot_be_replaced_after_all_keeps_the_new_run_beside_it(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Path:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(place, "put_in_place", broken)
    with pytest.raises(ResourceError, match=r"it is as it was, and the new run is in .*c\.training; go on with it by"):
        loop.train(tiny(seed=1), out, data=[text], force=True)
    assert (seed(out), step(out)) == (0, 2)
    training = out.with_name("c.training")
    assert (seed(training), step(training)) == (1, 4)
    loop.resume(training, {})


def test_where_names_cannot_be_exchanged_two_renames_do_it(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace, "exchange", lambda one, other: False)
    loop.train(tiny(seed=1), out, data=[text], force=True)
    assert beside(out) == {"c"}
    assert seed(out) == 1


def test_an_empty_folder_and_a_bundle_are_replaced(out: Path, text: Path) -> None:
    empty = out.with_name("empty")
    empty.mkdir()
    loop.train(tiny(steps=2), empty, data=[text], force=True)
    assert step(empty) == 2
    bundle = out.with_name("bundle")
    bundle.mkdir()
    (bundle / "pastkey.json").write_text('{"kind": "bundle"}')
    loop.train(tiny(steps=2), bundle, data=[text], force=True)
    assert step(bundle) == 2
    assert beside(out) == {"c", "empty", "bundle"}


def test_leftovers_of_killed_runs_are_told(out: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = out.with_name(".c.abcdefgh.partial")
    left.mkdir()
    loop.train(tiny(steps=2), out, data=[text], force=True)
    assert f"{left} was left by a run that was killed; nothing needs it: remove it" in capsys.readouterr().err
    loop.resume(out, {"steps": 3})
    assert str(left) in capsys.readouterr().err
    assert left.exists()


# --- one process at a time ----------------------------------------------------------------------------------------
def test_while_a_run_trains_nobody_else_trains_there_or_replaces_it(
    out: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def others() -> None:
        monkeypatch.undo()
        for attempt in (
            lambda: loop.resume(out, {"steps": 20}),
            lambda: loop.train(tiny(), out, data=[text], force=True),
            lambda: refuse_existing(out, force=True),  # as an export does
        ):
            with pytest.raises(InUseError, match=rf"c is being trained by process {os.getpid()}: wait for its end"):
                attempt()
            refused.append(attempt)

    when(monkeypatch, 3, others)
    loop.resume(out, {"steps": 4})
    when(monkeypatch, 3, others)
    loop.train(tiny(seed=1), out, data=[text], force=True)
    shutil.rmtree(out)
    when(monkeypatch, 3, others)
    loop.train(tiny(), out, data=[text])
    assert len(refused) == 9
    assert beside(out) == {"c"}
    assert not list(out.rglob("lock"))


def train_command(out: Path, text: Path, *more: str) -> list[str]:
    flags = [item for name, value in TINY.items() for item in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "pastkey", "train", "--out", str(out), "--data", str(text), *flags, *more]


def until_trained(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits for the first lines of a run of many steps."""
    while process.poll() is None:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("saved", [False, True])
def test_signals_leave_the_old_one_or_what_was_saved(
    saved: bool, number: signal.Signals, status: int, out: Path, text: Path
) -> None:
    old, every = files(out), "20" if saved else "100000"
    process = subprocess.Popen(
        train_command(out, text, "--force", "--seed", "1", "--steps", "1000000", "--save-every", every),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )
    with process:
        try:
            until_trained(process, out if saved else out.with_name("c.training"))
            while saved and seed(out) == 0:
                time.sleep(0.05)
            process.send_signal(number)
            told = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == status
    assert "Traceback" not in told
    assert beside(out) == {"c"}
    if saved:
        assert seed(out) == 1
        assert step(out) >= 20
    else:
        assert files(out) == old


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
def test_under_nohup_a_closed_terminal_ends_nothing(text: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        train_command(tmp_path / "c", text, "--save-every", "1"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    with process:
        until_trained(process, tmp_path / "c")
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert step(tmp_path / "c") == 12
