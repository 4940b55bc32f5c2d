"""How often an export reads its weights. The counts depend on no size, so a tiny decoder shows them."""

from __future__ import annotations

import collections
import contextlib
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pastkey.runtime.providers.ort import onnxruntime

from .measure import Answer, Table

_CONTEXT = 1280  # tokens
_PART = "part of a graph, without the large weights"


def passes() -> Answer:
    """Arms: an int8 and an int4 export of a tiny decoder. Metric: runs that read all weights, by step and graph.

    A run of many tokens, or of several rows, counts once.
    """
    for precision in ("int8", "int4"):
        found = counted(precision)
        stages = list(dict.fromkeys(stage for stage, _ in found.runs))
        readers = [*dict.fromkeys(reader for _, reader in found.runs)]
        rows = [[stage, *(str(found.runs[stage, reader] or "") for reader in readers)] for stage in stages]
        totals = [str(sum(found.runs[stage, reader] for stage in stages)) for reader in readers]
        rows.append(["**all**", *(f"**{total}**" for total in totals)])
        yield Table(f"Runs of an {precision} export:", ["step", *readers], rows)
        yield (
            f"{found.opened} float32 sessions were opened, at most {found.most} at a time, "
            f"{found.in_place} of them over the file's own bytes, the others over a packed copy."
        )


class Counts:
    """The runs and opened files of an export."""

    def __init__(self) -> None:
        self.stage = ""
        self.runs: collections.Counter[tuple[str, str]] = collections.Counter()  # (step, reader) -> runs
        self.opened = self.in_place = self.most = 0  # sessions over float32 weights
        self._open = 0

    def ran(self, reader: str) -> None:
        """A run of a graph or of the module."""
        if reader != _PART:
            self.runs[self.stage, reader] += 1

    def began(self, session: Any, options: Any) -> None:
        """A session over float32 weights."""
        self.opened, self._open = self.opened + 1, self._open + 1
        self.most = max(self.most, self._open)
        with contextlib.suppress(RuntimeError):  # without the entry
            self.in_place += options.get_session_config_entry("session.disable_prepacking") == "1"
        weakref.finalize(session, self._ended)

    def _ended(self) -> None:
        self._open -= 1


def counted(precision: str) -> Counts:
    """Exports a tiny decoder, and counts."""
    import torch

    from pastkey.contract.config import ModelConfig
    from pastkey.export import export
    from pastkey.export.progress import Progress
    from pastkey.train.model import Decoder

    counts = Counts()

    class Counting(Decoder):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            counts.ran("torch")
            return super().forward(input_ids, position_ids)

    class Stages(Progress):
        def stage(self, name: str) -> None:
            counts.stage = name.partition(":")[0].partition(" of ")[0].partition(" on ")[0]

    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT,
    )
    torch.manual_seed(0)
    decoder = Counting(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    with tempfile.TemporaryDirectory() as folder, _watched(counts):
        export(decoder, Path(folder) / "bundle", precision, context_length=_CONTEXT, progress=Stages())
    return counts


@contextlib.contextmanager
def _watched(counts: Counts) -> Iterator[None]:
    """Counts the runs of every onnxruntime session that is opened meanwhile."""
    base = onnxruntime.InferenceSession
    plain = {name: getattr(base, name) for name in ("__init__", "run", "run_with_iobinding")}

    def opened(session: Any, path: str | bytes, sess_options: Any = None, *others: Any, **named: Any) -> None:
        plain["__init__"](session, path, sess_options, *others, **named)
        session.reader = _reader(path)
        if session.reader.startswith("float32"):
            counts.began(session, sess_options)

    def run(session: Any, *given: Any, **named: Any) -> Any:
        counts.ran(session.reader)
        return plain["run"](session, *given, **named)

    def run_bound(session: Any, *given: Any, **named: Any) -> Any:
        counts.ran(session.reader)
        return plain["run_with_iobinding"](session, *given, **named)

    base.__init__, base.run, base.run_with_iobinding = opened, run, run_bound
    try:
        yield
    finally:
        for name, method in plain.items():
            setattr(base, name, method)


def _reader(graph: str | bytes) -> str:
    """The graph's file, with the precision of its weights."""
    if isinstance(graph, bytes):
        return _PART
    path = Path(graph)
    # A folder inside .fp32 holds the int8 graph that writes the own text.
    return f"float32 {path.name}" if path.parent.parent.name == ".fp32" else path.name
