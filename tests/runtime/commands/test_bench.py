from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pastkey.runtime.commands.bench import bench, clamp


def test_the_report_has_the_figures_and_what_they_were_measured_with(command, bundle):
    arguments = ["bench", bundle.path, "--prompt-tokens", 20, "--new-tokens", 10, "--threads", 1]
    status, out, err = command(*arguments, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    settings = report.pop("settings")
    assert set(report) == {"prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "peak_rss_bytes"}
    assert min(report.values()) > 0
    assert (settings["prompt_tokens"], settings["new_tokens"], settings["threads"]) == (20, 10, 1)
    assert (settings["provider"], settings["graph"]) == ("CPUExecutionProvider", bundle.manifest.graph)
    assert "note" not in settings
    status, out, err = command(*arguments)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["prefill", "decode", "load", "memory"]


@pytest.mark.parametrize(
    ("asked", "context", "expected"),
    [((512, 128), 640, (512, 128)), ((512, 128), 639, (511, 128)), ((512, 128), 1, (1, 0)), ((2, 128), 11, (2, 5))],
)
def test_clamp(asked, context, expected):
    assert clamp(*asked, context) == expected


def test_it_says_what_it_clamped_and_has_no_figure_of_no_tokens(command, fused_bundle):
    status, _, err = command("bench", fused_bundle.path, "--prompt-tokens", 9999, "--new-tokens", 2)
    assert (status, "the context is 600: 598 + 2 tokens were measured" in err) == (0, True)
    assert bench(fused_bundle.path, prompt_tokens=3, new_tokens=0, threads=1).decode_tokens_per_second is None


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
