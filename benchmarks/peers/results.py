"""What was measured, as a page."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .engines import Engine
from .quality import ANSWER, QUESTIONS, WINDOW, Quality
from .speed import FIRST, LOADS, LONG, SHORT, Load, Ratio, Speed

_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
EXACT = 1e-6  # nats: below it, differences are those of float32 itself


@dataclass(frozen=True)
class Row:
    """All figures of one engine."""

    engine: Engine
    versions: dict[str, str]
    size: int  # bytes of the files
    quality: Quality
    speeds: dict[int, Speed]  # prompt tokens -> tokens per second, medians
    ratios: dict[tuple[int, str], Ratio]  # (prompt tokens, phase) -> over the fastest int8 peer; empty without one
    load: Load
    peak_bytes: int


@dataclass(frozen=True)
class Settings:
    """What all rows have in common."""

    model: str
    text: str
    windows: int
    places: int  # of the text where the prompts begin
    rounds: int
    threads: int
    command: str


def page(rows: Sequence[Row], skipped: dict[str, str], settings: Settings, chart: str, more: Sequence[str] = ()) -> str:
    """The Markdown of the results. `skipped`: engine -> why; `chart` and `more`: charts, by paths from the page."""
    rivals = [row.engine.title for row in rows if row.engine.rival]
    parts = [
        "# Beside other engines\n",
        f"Measured by `{settings.command}` on {datetime.date.today():%d %B %Y}: {settings.model}, the same weights for "
        f"every engine, {settings.threads} threads.\n",
        table(rows),
        f"MB: all files of the model, in 10⁶ bytes. KL divergence from float32, top-1 agreement with it, and "
        f"perplexity: means over {settings.windows} times {WINDOW} tokens of {settings.text}. Answers: the share "
        f"of {len(QUESTIONS)} short questions whose greedy answer (up to {ANSWER} tokens) equals float32's to its "
        f"end, and the share of those tokens that come before the first difference. Speeds: medians of "
        f"{settings.rounds} interleaved rounds, whose prompts begin at {settings.places} places of that text; decode "
        f"of {SHORT.new} tokens after {SHORT.prompt}, and of {LONG.new} after {LONG.prompt}. Peak: resident memory of "
        f"a fresh process over {SHORT.prompt} + {SHORT.new} tokens. First token: of a prompt of {FIRST.prompt} tokens, "
        f"from the start of a fresh process, and in brackets from the end of its imports; medians of {LOADS} "
        f"processes, files in the page cache.\n",
    ]
    if rivals:
        parts += [
            f"## Speed over the fastest int8 peer\n\nOf {_listed(rivals)}, the fastest in the same round counts. "
            "Medians of the rounds' ratios with their range.\n",
            ratio_table(rows),
            f"![decode speed against KL divergence]({chart})\n",
        ]
    if more:
        parts.append(
            "## How pastkey int8 scales\n\n" + "\n".join(f"![{Path(path).stem}]({path})" for path in more) + "\n"
        )
    if skipped:
        parts.append("## Not measured\n\n" + "\n".join(f"- {who}: {why}" for who, why in skipped.items()) + "\n")
    parts.append("## Machine and versions\n\n" + "\n".join(f"- {line}" for line in [*machine(), *_versions(rows)]))
    return "\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """One line per engine."""
    prompts = list(rows[0].speeds)
    head = ["engine", "MB", "KL divergence (nats)", "top-1", "perplexity", "answers equal (tokens)"]
    head += [f"prefill {prompt} (tok/s)" for prompt in prompts] + [f"decode {prompt} (tok/s)" for prompt in prompts]
    lines = [[*head, "peak (MiB)", "first token (s)"]]
    for row in rows:
        quality = row.quality
        kl = f"{quality.kl_divergence:.2g}" if quality.kl_divergence >= EXACT else "0"
        lines.append(
            [
                row.engine.title,
                f"{row.size / 1e6:.0f}",
                f"{quality.kl_divergence:.4f}" if 1e-4 <= quality.kl_divergence < 1 else kl,
                f"{quality.top1_agreement:.1%}",
                f"{quality.perplexity:.2f}",
                f"{quality.equal_answers:.0%} ({quality.equal_tokens:.0%})",
                *(f"{row.speeds[prompt].prefill:.0f}" for prompt in prompts),
                *(f"{row.speeds[prompt].decode:.1f}" for prompt in prompts),
                f"{row.peak_bytes / 2**20:.0f}",
                f"{row.load.process:.2f} ({row.load.model:.2f})",
            ]
        )
    return markdown(lines)


def ratio_table(rows: Sequence[Row]) -> str:
    """One line per engine: speed over the fastest int8 peer's."""
    kinds = list(rows[0].ratios)
    lines = [["engine", *(f"{phase} {prompt}" for prompt, phase in kinds)]]
    for row in rows:
        found = [row.ratios[kind] for kind in kinds]
        lines.append([row.engine.title, *(f"{r.median:.2f} ({r.low:.2f} to {r.high:.2f})" for r in found)])
    return markdown(lines)


def machine() -> list[str]:
    """Processor, memory and system, as far as Linux says."""
    model, flags, memory = platform.processor() or platform.machine(), set[str](), ""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal:"):
            memory = f", {int(line.split()[1]) / 2**20:.0f} GiB of memory"
    known = ", ".join(flag for flag in _FLAGS if flag in flags)
    return [
        f"{model}, {os.cpu_count()} cores{memory}" + (f"; {known}" if known else ""),
        f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}",
    ]


def _versions(rows: Sequence[Row]) -> list[str]:
    """A line for each program: its versions, and how its engines were made."""
    lines = []
    for runtime, versions in {row.engine.runtime: row.versions for row in rows}.items():
        how = [f"{row.engine.title} by {row.engine.how}" for row in rows if row.engine.runtime == runtime]
        lines.append(", ".join(f"{name} {version}" for name, version in versions.items()) + ": " + "; ".join(how))
    return lines


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]) + "\n"
