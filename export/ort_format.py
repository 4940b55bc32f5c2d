"""Writes pastkey's own graph in onnxruntime's ORT format: one file with its weights, for phones and small builds.

A file of this format always embeds its weights, even if onnxruntime is told to write external data. So one graph has to
serve all uses: with `logits_start` = -(number of new tokens) it returns the result of the all-logits graph.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import ParityError
from pastkey.runtime.engine.engine import Engine, Ids, Logits
from pastkey.runtime.providers.ort import onnxruntime

from .compare import NUMBERS, logits_difference
from .graph.write.embedding_rows import give_embedding_back
from .progress import Progress
from .resources import require_ort_size

_TOOL = "onnxruntime.tools.convert_onnx_models_to_ort"
_TOKENS = 9  # tokens of the text that both files are run on


def write_ort_format(bundle: Bundle, progress: Progress) -> None:
    """Writes names.ORT_GRAPH and names.ORT_OPERATORS into a bundle's folder.

    Raises ParityError if onnxruntime cannot write the file, or its results differ from the bundle's graph.
    """
    progress.stage("write the ORT format")
    graph, operators = bundle.path / names.ORT_GRAPH, bundle.path / names.ORT_OPERATORS
    model = ir.load(bundle.last_logits_graph)
    weights = sum(path.stat().st_size for path in graph.parent.iterdir() if names.is_weights_file(path.name))
    require_ort_size(weights, bundle.manifest.precision)
    give_embedding_back(model, graph.parent)
    source = graph.with_name("ort_source.onnx")  # next to the weights file that it names
    with tempfile.TemporaryDirectory(dir=bundle.path, prefix=".ort-") as made:
        ir.save(model, source)
        _convert(source, Path(made))
        source.unlink()
        (Path(made) / f"{source.stem}.ort").rename(graph)
        listed = (Path(made) / f"{source.stem}.required_operators.config").read_text(encoding="utf-8").splitlines()
    lines = [line for line in listed if not line.startswith("#")]  # comments name a folder of the exporting machine
    operators.write_text(
        "\n".join(
            [f"# The operators of {graph.name}, by onnxruntime {onnxruntime.__version__}", *filter(None, lines), ""]
        ),
        encoding="utf-8",
    )
    _require_equal(bundle)


def _convert(source: Path, folder: Path) -> None:
    """Runs onnxruntime's converter in a child process: when imported, it reconfigures global logging."""
    program: list[str | Path] = [sys.executable, "-P", "-m", _TOOL, source]  # -P: not from the current directory
    # Fixed: optimize at conversion. `arm` leaves out optimizations that only server CPUs run.
    settings: list[str | Path] = ["--output_dir", folder, "--optimization_style", "Fixed", "--target_platform", "arm"]
    done = subprocess.run([*program, *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit status {done.returncode}")
        raise ParityError(f"onnxruntime cannot write the graph in its ORT format ({reason}): use --format onnx")


class OrtBundle(Bundle):
    """A bundle whose graph in the ORT format is the one that its engine opens."""

    @property
    def last_logits_graph(self) -> Path:
        return self.path / names.ORT_GRAPH


def _require_equal(bundle: Bundle) -> None:
    count = min(_TOKENS, bundle.manifest.context_length)
    ids = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, count)
    apart = logits_difference(_logits(bundle, ids), _logits(OrtBundle(bundle.path, bundle.manifest), ids))
    if not apart <= NUMBERS:
        raise ParityError(
            f"in the ORT format of {bundle.last_logits_graph.name} logits differ by {apart:.1e} of the largest logit "
            f"(limit {NUMBERS:.0e}): onnxruntime {onnxruntime.__version__} optimises it wrongly; install another "
            "release of it, or use --format onnx"
        )


def _logits(bundle: Bundle, ids: Ids) -> Logits:
    """Returns the logits of every position, (T, V), one token at a time."""
    engine = Engine(bundle, providers="cpu", native=False)
    return np.stack([engine.prefill(ids[:1]), *(engine.decode(int(token)) for token in ids[1:])])
