"""The lines and the picture that a run leaves."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from pastkey.train import report
from pastkey.train.report import MetricsFile, TrainingProgress, draw_loss_curve, read_metrics


def test_opening_the_metrics_drops_what_came_after_the_step(tmp_path):
    with closing(MetricsFile(tmp_path, 0)) as metrics:
        for step in (1, 2, 3):
            metrics.add({"step": step, "loss": 1 / step})
        metrics.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with closing(MetricsFile(tmp_path, 2)) as metrics:
        metrics.add({"step": 3, "loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.5}]


NO_ROWS = (
    "",
    "a note",
    "[]",
    "{}",
    '{"step": "2"}',
    '{"step": 2, "loss": "x"}',
    '{"step": 2, "val_loss": NaN}',
    "\xff",
)


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_was_edited_by_hand_is_kept_and_not_read(line, tmp_path):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([rows[0], line, *rows[1:]]) + "\n", encoding="latin-1")
    with closing(MetricsFile(tmp_path, 3)) as metrics:
        metrics.add({"step": 4, "loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (3, 1.0), (4, 2.0)]
    assert (tmp_path / "metrics.jsonl").read_text(encoding="latin-1").splitlines()[1:2] == [line]
    draw_loss_curve(tmp_path)


def test_metrics_are_strict_json(tmp_path):
    with closing(MetricsFile(tmp_path, 0)) as metrics:
        with pytest.raises(ValueError, match="JSON compliant"):
            metrics.add({"step": 1, "loss": float("nan")})
        metrics.add({"step": 1, "loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("rows", [[{"step": 1, "loss": 3.0}], [{"step": 1, "loss": 3.0}, {"step": 1, "val_loss": 2.9}]])
def test_the_curve_is_drawn_from_however_many_points(rows, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_loss_curve(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_away_from_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    with closing(TrainingProgress(0)) as progress:
        for step in range(1, 41):
            now += 1.0
            progress.update(step, 40, 2.0, 1234.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 10 of 40: loss 2.000, 1,234 tokens/s, 30 s left"
    assert len(lines) == 4
