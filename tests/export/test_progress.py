"""What an export tells: a listener hears everything, and warnings are kept for the report."""

from __future__ import annotations

from pastkey.export.progress import Progress, Recorder


class Heard(Progress):
    def __init__(self) -> None:
        self.all: list[object] = []

    def stage(self, name: str) -> None:
        self.all.append(name)

    def warn(self, sentence: str) -> None:
        self.all.append(f"warning: {sentence}")


def test_a_recorder_passes_everything_on_and_keeps_the_warnings():
    heard = Heard()
    recorder = Recorder(heard)
    recorder.stage("trace")
    recorder.warn("odd")
    assert heard.all == ["trace", "warning: odd"]
    assert recorder.warnings == ["odd"]
