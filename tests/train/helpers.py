"""What the tests of training share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pastkey.contract import names
from pastkey.train.checkpoint import TOKENS_TRAIN, TOKENS_VAL, TrainingState
from pastkey.train.loop import Run
from pastkey.train.settings import TrainConfig

TINY: dict[str, Any] = {
    "preset": "llama", "steps": 12, "batch_size": 4, "save_every": 4, "warmup_steps": 2, "context": 32,
    "hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "tokenizer": "char", "threads": 1,
}  # fmt: skip


def before_step(monkeypatch: pytest.MonkeyPatch, at: int, happens: Callable[[], object]) -> None:
    """Lets something happen before the step after step `at` of a run."""
    original = Run._one_step

    def stepping(run: Run) -> dict[str, Any]:
        if run.step == at:
            happens()
        return original(run)

    monkeypatch.setattr(Run, "_one_step", stepping)


class Stop(BaseException):
    """Ends a run."""


def stop() -> None:
    raise Stop


def tiny(**changes: Any) -> TrainConfig:
    return TrainConfig.from_given(TINY | changes)


def bare_checkpoint(folder: Path) -> Path:
    """A folder with stand-ins for the files that a save needs."""
    (folder / "training").mkdir(parents=True)
    for name in (names.TOKENIZER, names.TOKENIZER_CONFIG):
        (folder / name).write_text("{}", encoding="utf-8")
    for name in (TOKENS_TRAIN, TOKENS_VAL):
        (folder / name).write_bytes(b"\x00\x00")
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def no_state(step: int = 0, **figures: Any) -> TrainingState:
    return TrainingState(step, {}, {}, {}, figures)


def write_corpus(path: Path, paragraphs: int = 60) -> Path:
    """A text file of a few kilobytes, in one document."""
    line = "Line {}: the cat sat on mat {}, and the dog saw it.\n"
    path.write_text("".join(line.format(number, number * 7 % 13) for number in range(paragraphs)), encoding="utf-8")
    return path


def flags(settings: Mapping[str, object]) -> list[str]:
    """The flags of `pastkey train` for these settings."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
