from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from pastkey.runtime.commands.bench import bench, clamp, peak_rss_bytes

Run = Callable[..., tuple[int, str, str]]


def test_the_report_has_the_figures_and_what_they_were_measured_with(bundle):
    report = bench(bundle.path, prompt_tokens=20, new_tokens=10, threads=1).to_json()
    assert set(report) == {
        "prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "peak_rss_bytes",
        "settings",
    }  # fmt: skip
    assert all(report[name] > 0 for name in report if name != "settings")
    settings = report["settings"]
    assert (settings["prompt_tokens"], settings["new_tokens"], settings["threads"]) == (20, 10, 1)
    assert (settings["provider"], settings["graph"]) == ("CPUExecutionProvider", bundle.manifest.graph)
    assert "note" not in settings
    json.dumps(report)


@pytest.mark.parametrize(
    ("asked", "context", "expected"),
    [((512, 128), 640, (512, 128)), ((512, 128), 639, (511, 128)), ((512, 128), 1, (1, 0)), ((2, 128), 11, (2, 5))],
)
def test_clamp(asked: tuple[int, int], context: int, expected: tuple[int, int]):
    assert clamp(*asked, context) == expected


def test_without_new_tokens_there_is_no_decode_figure(bundle):
    assert bench(bundle.path, prompt_tokens=3, new_tokens=0, threads=1).decode_tokens_per_second is None


def test_peak_memory_sees_what_was_held_and_let_go():
    program = (
        "from pastkey.runtime.commands.bench import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "held = b'x' * 80_000_000\n"
        "del held\n"
        "print(peak_rss_bytes() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 60_000_000 < int(done.stdout) < 120_000_000
    assert peak_rss_bytes()


def test_bench(command, bundle):
    arguments = ["bench", bundle.path, "--prompt-tokens", 9, "--new-tokens", 4, "--threads", 1]
    status, out, err = command(*arguments, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["decode_tokens_per_second"] > 0
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["prefill", "decode", "load", "memory"]


def test_bench_says_what_it_clamped(command, bundle):
    status, _, err = command("bench", bundle.path, "--prompt-tokens", 9999, "--new-tokens", 2)
    assert status == 0
    assert "the context is 600: 598 + 2 tokens were measured" in err
