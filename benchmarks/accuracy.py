"""Questions about what quantization and training give: accuracy, size and speed."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.errors import InputError
from pastkey.files.folder import read_text
from pastkey.runtime import Engine, load
from pastkey.runtime.text.codec import TextCodec

from .measure import (
    MIB,
    Answer,
    Table,
    TextFile,
    facts_of,
    interleaved,
    paired,
    seconds,
)
from .peers.workers.protocol import peak_rss_bytes
from .texts import story_ids


def calibration(bundle: Path, text: TextFile, *, windows: int = 4, length: int = 256) -> Answer:
    """Arms: int8 without and with calibration. Metric: KL divergence from float32 and top-1 agreement on a text.

    The windows follow one another from the middle of the text on.
    """
    import onnx_ir as ir

    from pastkey.export.measure.metrics import kl_divergence, top1_agreement
    from pastkey.export.quantize.calibrate import calibration
    from pastkey.export.quantize.calibrate.activations import probing
    from pastkey.export.quantize.rounding.rewrite import quantize
    from pastkey.precisions import PRECISIONS

    with tempfile.TemporaryDirectory() as temporary:
        # A copy: graphs under test are next to the weights meanwhile.
        copied = open_bundle(shutil.copytree(bundle, Path(temporary) / "bundle"))
        if copied.manifest.precision != "fp32" or copied.tokenizer is None:
            raise InputError(f"{bundle} is not a float32 bundle with a tokenizer: export with --precision fp32")
        ids = TextCodec.from_file(copied.tokenizer).encode(read_text(text))
        middle = len(ids) // 2
        starts = range(middle, min(middle + windows * length, len(ids)), length)
        parts = [np.array(ids[start : start + length]) for start in starts]
        chosen = calibration.calibration_text(copied, None, PRECISIONS["int8"].calibration_windows)
        folder, plain = copied.all_logits_graph.parent, ir.load(copied.all_logits_graph)
        calibrated = ir.load(calibration.calibrated(copied, chosen.calibration_set, folder / "calibrated.onnx"))

        def logits(model: ir.Model) -> list[Any]:
            """(T, V) of each window."""
            found = []
            for window in parts:
                with probing(model, folder, [names.LOGITS]) as probe:
                    found.append(probe(window)[names.LOGITS])
            return found

        expected, rows = logits(plain), []
        for name, model in (("plain", plain), ("calibrated", calibrated)):
            quantize(model)
            pairs = list(zip(expected, logits(model), strict=True))
            divergence = np.mean([kl_divergence(one, other) for one, other in pairs])
            agreement = np.mean([top1_agreement(one, other) for one, other in pairs])
            rows.append([name, f"{divergence:.2g}", f"{agreement:.1%}"])
        yield Table("int8 beside float32:", ["int8", "KL divergence (nats)", "top-1 agreement"], rows)
        yield facts_of(copied)


def stories(bundles: Sequence[Path], *, count: int = 100, temperature: float = 0.7) -> Answer:
    """Arms: bundles, which draw with the same seeds. Metric: the share of stories that the grammar accepts."""
    for bundle in bundles:
        share, reasons = accepted(bundle, count, temperature)
        yield f"{bundle}: the grammar accepts {share:.0%} of {count} generated stories."
        if reasons:
            yield "  Refused: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)) + "."


def accepted(bundle: Path, count: int, temperature: float) -> tuple[float, Counter[str]]:
    """The share of stories, seeds 0, 1, 2, ..., that the grammar accepts, and why it refuses others."""
    from pastkey.train.stories import check_story

    with load(bundle) as lm:
        texts = (lm.generate("", max_new_tokens=256, temperature=temperature, seed=seed).text for seed in range(count))
        verdicts = [check_story(text) for text in texts]
    return sum(one.ok for one in verdicts) / count, Counter(one.reason for one in verdicts if not one.ok)


# --- the decoder of make demo -------------------------------------------------------------------------------------
PROMPT, NEW = 128, 64  # tokens; together the demo's context
TURNS = 9  # of a bundle in a round


def demo(demo: Path, *, rounds: int = 11, count: int = 200) -> Answer:
    """Arms: float32 and int8. Metric: sizes, error, stories, and the speed of prefill and decode over float32's."""
    bundles = {name: open_bundle(demo / name) for name in ("fp32", "int8")}
    sizes = [
        sum(record.size for name, record in one.manifest.files.items() if names.is_weights_file(name))
        for one in bundles.values()
    ]
    shares = [f"{accepted(one.path, count, 0.7)[0]:.1%}" for one in bundles.values()]
    checks = bundles["fp32"].manifest.parity["fp32"]["checks"].values()
    worst = max(one["value"] for one in checks if one["measure"] == "max_relative_difference")
    quality = bundles["int8"].manifest.quality
    engines = {name: Engine(one) for name, one in bundles.items()}
    ids = np.random.default_rng(0).integers(0, bundles["fp32"].manifest.vocab_size, PROMPT + NEW)

    def phases(engine: Engine, _: int) -> dict[str, float]:
        times: dict[str, list[float]] = {"prefill": [], "decode": []}
        for _turn in range(TURNS):
            engine.reset()
            times["prefill"].append(seconds(lambda: engine.prefill(ids[:PROMPT])))
            times["decode"].append(seconds(lambda: [engine.decode(token) for token in ids[PROMPT:].tolist()]))
        return {phase: statistics.median(taken) for phase, taken in times.items()}

    measured = interleaved({name: partial(phases, engine) for name, engine in engines.items()}, rounds, "demo")
    speed = {
        phase: paired([{arm: one[arm][phase] for arm in one} for one in measured], "fp32", "int8")
        for phase in ("prefill", "decode")
    }
    figures = json.loads((demo / "checkpoint" / "pastkey.json").read_text(encoding="utf-8"))["training"]["figures"]
    imports = [
        1e3 * _import_seconds("pastkey", beforehand="sys"),
        1e3 * _import_seconds("pastkey.runtime.model.language_model", beforehand="numpy, onnxruntime"),
    ]
    rows = [
        ["weights", f"{sizes[0] / 1e6:.2f} MB", f"{sizes[1] / 1e6:.2f} MB, {sizes[1] / sizes[0]:.3f} of float32"],
        ["largest difference from torch, of the largest logit, over all checks", f"{worst:.1e}", ""],
        [
            "KL divergence from float32, top-1 agreement",
            "",
            f"{quality['kl_divergence']:.1e} nats, {quality['top1_agreement']:.1%}",
        ],
        [f"stories that the grammar accepts ({count}, temperature 0.7)", *shares],
        [f"prefill of {PROMPT} tokens, speed", "1", f"{speed['prefill']}"],
        [f"decode of {NEW} tokens after them, speed", "1", f"{speed['decode']}"],
    ]
    yield Table("", ["", "float32", "int8"], rows)
    yield (
        f"The decoder of `make demo` (held-out loss {figures['val_loss']:.3f} nats per token, "
        f"{figures['bits_per_byte']:.3f} bits per byte); medians of {rounds} interleaved rounds of {TURNS} runs "
        "each, with their range."
    )
    yield (
        f"`import pastkey` takes {imports[0]:.0f} ms, and `import pastkey.runtime` with its session "
        f"{imports[1]:.0f} ms more than numpy and onnxruntime (medians of 11 processes)."
    )
    yield facts_of(bundles["int8"], engines["int8"].graph.threads)


def _import_seconds(module: str, beforehand: str) -> float:
    """Median seconds of importing a module in a fresh process, after `beforehand`."""
    code = (
        f"import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'; import {beforehand}, time; t = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", code]
    return statistics.median(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(11)
    )


def text_embeddings(bundle: Path, *, threads: int = 2, rounds: int = 9, reference: Path | None = None) -> Answer:
    """Arms: 24 texts of 7 tokens in a batch, and one by one. Metric: CPU time, the peak of this process, cosine."""
    model = load(bundle, threads=threads)
    ids = story_ids(model, 24 * 7)
    texts = [ids[start : start + 7] for start in range(0, len(ids), 7)]
    model.generate(texts[0], max_new_tokens=16)
    generated = peak_rss_bytes()
    model.embed(texts)
    embedded = peak_rss_bytes()
    Engine(model.bundle, threads=model.require_open().graph.threads).hidden_states([texts[0]])
    own, session = (embedded - generated) / MIB, (peak_rss_bytes() - embedded) / MIB
    yield f"Memory: {own:.0f} MiB more than generating; a session of its own would take {session:.0f} MiB."
    arms: dict[str, Callable[[int], float]] = {
        "together": lambda _: seconds(lambda: model.embed(texts), time.process_time),
        "singly": lambda _: seconds(lambda: [model.embed(text) for text in texts], time.process_time),
    }
    measured = interleaved(arms, rounds, "embeddings")
    yield f"CPU time of all texts in a batch over one by one: {paired(measured, 'together', 'singly')}."
    if reference is not None:
        with load(reference, threads=threads) as fp32:
            cosines = np.sum(model.embed(texts) * fp32.embed(texts), axis=1)
        yield f"Cosine with float32: {cosines.min():.5f} at least, {cosines.mean():.5f} on average."
    yield facts_of(model.bundle, threads)
