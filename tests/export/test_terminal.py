"""The stages of an export as they are shown: lines in a file, a moving part on a terminal."""

from __future__ import annotations

import io
import itertools
import re
import threading

import pytest

from pastkey.export import terminal
from pastkey.export.progress import Recorder
from pastkey.export.terminal import StageLines

from .commands import Heard


class Terminal(io.StringIO):
    """A stream that says when something was drawn."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self._live = live
        self.drawn = threading.Event()

    def isatty(self) -> bool:
        return self._live

    def write(self, text: str) -> int:
        self.drawn.set()
        return super().write(text)


def show(live: bool, monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal(live)
    monkeypatch.setattr(terminal.sys, "stderr", screen)
    return screen


def test_without_a_terminal_a_stage_is_a_line_when_it_ends(monkeypatch):
    screen = show(False, monkeypatch)
    with StageLines() as stages:
        stages.stage("trace")
        assert screen.getvalue() == ""
        stages.stage("verify")
        stages.warn("something is odd")
    drawn = re.sub(r"\d+\.\d s", "N s", screen.getvalue())
    assert drawn == "  trace  N s\nwarning: something is odd\n  verify  N s\n"


def test_without_a_terminal_a_long_stage_is_a_line_now_and_then(monkeypatch):
    screen = show(False, monkeypatch)
    monkeypatch.setattr(terminal, "_HEARTBEAT", 0.0)
    monkeypatch.setattr(terminal, "_REDRAWN", 0.001)
    with StageLines() as stages:
        stages.stage("trace")
        stages.advance(1, 4)
        screen.drawn.clear()
        assert screen.drawn.wait(60)
    assert re.search(r"^  trace( 25%)?: 0 s$", screen.getvalue(), re.MULTILINE)


def test_on_a_terminal_the_current_stage_moves_by_itself(monkeypatch):
    screen = show(True, monkeypatch)
    monkeypatch.setattr(terminal, "_REDRAWN", 0.001)
    with StageLines() as stages:
        stages.stage("calibrate")
        stages.advance(1, 2)
        for _ in range(3):
            screen.drawn.clear()
            assert screen.drawn.wait(60)
    drawn = screen.getvalue()
    assert "calibrate 50%  0 s" in drawn
    assert len(set(re.findall(r"\r\x1b\[K([|/\\-]) ", drawn))) > 1
    assert drawn.endswith(" s\n")


def test_the_time_left_follows_from_the_parts_and_counts_down_between_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(terminal, "_REDRAWN", 1000)  # no thread draws
    screen = show(True, monkeypatch)
    drawn = []
    with StageLines() as stages:
        stages.stage("verify")
        for at, done in ((1.0, 1), (59.0, 8), (90.0, 10), (100.0, None), (5000.0, None), (7200.0, 20)):
            clock[0] = at
            if done is not None:
                stages.advance(done, 40)
            stages._redraw()
            drawn.append(screen.getvalue().rpartition("verify")[2])
    assert drawn == [
        " 2%  1 s",
        " 20%  59 s",  # too early to tell
        " 25%  1:30 min, about 4:30 min left",
        " 25%  1:40 min, about 4:20 min left",
        " 25%  1:23:20 h",
        " 50%  2:00:00 h, about 2:00:00 h left",
    ]


def test_the_share_is_that_of_all_planned_phases_and_never_falls(monkeypatch):
    monkeypatch.setattr(terminal, "_REDRAWN", 1000)
    screen = show(True, monkeypatch)
    with StageLines() as stages:
        stages.plan({"open": 10, "fetch": 10})
        stages.stage("open it")
        stages.advance(1, 2)
        stages.plan({"open": 1, "trace": 4, "write": 4, "prove": 1})  # its size is known
        for name in ("trace it", "no phase of the plan", "write it", "trace it", "prove it"):
            stages.stage(name)
            stages.advance(1, 2)
            stages._redraw()
    drawn = re.findall(r"\r\x1b\[K[|/\\-] ([^\r]*?) +(\d+%)  0 s", screen.getvalue())
    assert [at for at, _ in itertools.groupby(drawn)] == [
        ("open it", "0%"),
        *[("trace it", "25%"), ("trace it", "30%"), ("no phase of the plan", "30%"), ("write it", "50%")],
        *[("write it", "70%"), ("trace it (2)", "70%"), ("prove it", "90%"), ("prove it", "95%")],
    ]


def test_a_phase_that_was_taken_from_a_cache_does_not_shorten_the_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(terminal, "_REDRAWN", 1000)
    screen = show(True, monkeypatch)
    with StageLines() as stages:
        stages.plan({"trace": 1, "calibrate": 8, "write": 1})
        stages.stage("trace it")
        clock[0] = 60.0
        stages.stage("write it")
        clock[0] = 90.0
        stages.advance(1, 2)
        stages._redraw()
    assert "write it 95%  1:30 min, about 30 s left" in screen.getvalue()


def test_a_long_name_does_not_wrap_on_a_terminal_and_an_interrupt_ends_its_line(monkeypatch):
    screen = show(True, monkeypatch)
    monkeypatch.setenv("COLUMNS", "40")

    def run() -> None:
        with StageLines() as stages:
            stages.stage("x" * 100)
            assert len(screen.getvalue().removeprefix("\r\x1b[K")) <= 40
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert screen.getvalue().endswith("\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "pastkey-stages"]


def test_a_recorder_passes_everything_on_and_keeps_the_warnings():
    recorder = Recorder(heard := Heard())
    recorder.stage("trace")
    recorder.advance(1, 2)
    recorder.say("even")
    recorder.warn("odd")
    assert (heard.stages, heard.shares, heard.said) == (["trace"], [(1, 2)], ["even", "warning: odd"])
    assert recorder.warnings == ["odd"]
