"""What an export tells: a listener hears everything, and warnings are kept for the report."""

from __future__ import annotations

from pastkey.export.progress import SILENT, Progress, Recorder


class Heard(Progress):
    def __init__(self) -> None:
        self.all: list[object] = []

    def stage(self, name: str) -> None:
        self.all.append(name)

    def advance(self, done: int, total: int) -> None:
        self.all.append((done, total))

    def warn(self, sentence: str) -> None:
        self.all.append(f"warning: {sentence}")


def tell(progress: Progress) -> None:
    progress.stage("trace")
    progress.advance(1, 2)
    progress.warn("odd")


def test_a_recorder_passes_everything_on_and_keeps_the_warnings() -> None:
    heard = Heard()
    recorder = Recorder(heard)
    tell(recorder)
    assert heard.all == ["trace", (1, 2), "warning: odd"]
    assert recorder.warnings == ["odd"]


def test_nobody_need_listen() -> None:
    recorder = Recorder(SILENT)
    tell(recorder)
    assert recorder.warnings == ["odd"]
