"""The output of training: a progress bar or lines, metrics.jsonl, and the loss curve."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from tqdm import tqdm

from pastkey.command import say
from pastkey.files.durable import write_whole
from pastkey.values import is_number

from .checkpoint import LOSS_CURVE, METRICS


class MetricsFile:
    """metrics.jsonl: one JSON object per step ("step", "loss", "learning_rate", ...) and per validation ("val_loss").

    Opening it drops the lines after `step`, which a killed run wrote and a resumed one writes again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.open(folder, step)

    def open(self, folder: Path, step: int) -> None:
        """Opens the file in this folder to append to it."""
        # In binary, since the position to cut at counts bytes. Cutting in place needs no space on a full disk.
        self._file = (folder / METRICS).open("ab+")
        self._file.seek(0)
        kept = 0
        for line in self._file:
            row = _parse(line)
            if not line.endswith(b"\n") or (row is not None and row["step"] > step):
                break
            kept += len(line)
        self._file.truncate(kept)

    def close(self) -> None:
        """Writes the remaining lines, and closes the file."""
        self._file.close()

    def add(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Flushes the lines to disk, before the checkpoint that relies on them."""
        self._file.flush()
        os.fsync(self._file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, without a last line that a kill cut short, and lines that are not rows."""
    if not (folder / METRICS).exists():
        return []
    with (folder / METRICS).open("rb") as file:
        return [row for line in file if (row := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the row of a line; None if a kill or a full disk cut it short, or someone wrote something else."""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and "step" in row and all(map(is_number, row.values()))
    return row if whole else None


def draw_loss_curve(folder: Path) -> None:
    """Writes loss.png from metrics.jsonl: training and validation loss in nats per token over the steps."""
    rows = read_metrics(folder)
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color="#08519c", marker="o", markersize=3, label="held-out text")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), (-6, 8), textcoords="offset points", ha="right")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_yscale("log")  # the first steps are many times the last
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_whole(folder / LOSS_CURVE, picture.getvalue())


class TrainingProgress:
    """On a terminal, a bar with tokens per second and time left; elsewhere a plain line every few seconds."""

    _LINE_SECONDS = 10.0

    def __init__(self, step: int) -> None:
        self._first = step
        terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=step, unit="step", file=sys.stderr, dynamic_ncols=True) if terminal else None
        self._started = self._line_at = time.monotonic()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._bar.close()

    def update(
        self, step: int, steps: int, loss: float, tokens_per_second: float, utilization: float | None = None
    ) -> None:
        """Shows a step of `steps` as they are planned now.

        `utilization` is the share of the devices' peak that the model's operations use; None: not known.
        """
        shown = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        shown += "" if utilization is None else f", {utilization:.1%} of peak FLOPS"
        if self._bar is not None:
            self._bar.total = steps
            self._bar.update()
            self._bar.set_postfix_str(shown, refresh=False)
            return
        now = time.monotonic()
        if now - self._line_at < self._LINE_SECONDS:
            return
        self._line_at = now
        left = (now - self._started) / (step - self._first) * (steps - step)
        say(f"step {step} of {steps}: {shown}, {left:.0f} s left")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            say(text)
