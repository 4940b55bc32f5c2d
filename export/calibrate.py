"""Texts to calibrate on, and activations on them, for whatever is chosen by them: scales that move into weights."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from pastkey import names
from pastkey.bundle import Bundle, Manifest
from pastkey.errors import InputError
from pastkey.runtime import Session
from pastkey.runtime.ort import onnxruntime
from pastkey.runtime.text import TextCodec

from .evaluate import BundlePredictions, Ids, cut_windows, encode_file, evaluate, relative_difference
from .files import INLINE_BYTES
from .migrate import find_groups, migrate

WINDOWS, LENGTH = 8, 256  # of calibration text, and tokens of each, where the context has room for them
MIN_TOKENS = 64  # of a calibration file: fewer say nothing about the activations of other texts
_MONOTONOUS = 0.9  # of a text, as one and the same token: a word over and over, or a script the tokenizer cannot read
_AT_ONCE = 32  # windows that the model writes side by side
_MEASURED = 2  # windows that are kept apart, to measure on
# Of the largest logit. Moving a scale rounds every weight anew, by 6e-8; a wrong fold changes everything.
_MAX_CHANGE = 1e-4
_ROWS = 512  # of each activation, spread over the text
_NOTHING: Mapping[str, np.ndarray] = {}


class Probe(Protocol):
    """Runs the graph on ids (T,), and on whatever further inputs it has."""

    def __call__(self, ids: Ids, further: Mapping[str, np.ndarray] = ..., /) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids (T,): some to choose by, and others to measure on."""

    source: str  # "own", or "given" by the user
    chosen_by: tuple[Ids, ...]
    measured_on: tuple[Ids, ...]


def read_calibration(file: str | Path, tokenizer: bytes | None, windows: int = WINDOWS) -> list[int]:
    """The token ids of the user's calibration text. Raises MissingFileError or InputError where it cannot be used."""
    if tokenizer is None:
        raise InputError(
            "this model has no tokenizer to read a calibration text with: give --tokenizer FILE, or leave out "
            "--calibration for text of the model's own"
        )
    ids = encode_file(file, TextCodec(Tokenizer.from_str(tokenizer.decode())), MIN_TOKENS)
    if len(ids) < MIN_TOKENS:
        raise InputError(
            f"{file} is too short to calibrate on, {len(ids)} token{'s' * (len(ids) != 1)}: at least {MIN_TOKENS} are "
            f"needed, and {windows * LENGTH:,} are used; leave out --calibration for text of the model's own"
        )
    [(_, most)] = Counter(ids).most_common(1)
    if most > _MONOTONOUS * len(ids):
        raise InputError(
            f"{file} is one token {most} times in {len(ids)} for this tokenizer, which says nothing about other texts: "
            "give one in the model's language, or leave out --calibration for text of the model's own"
        )
    return ids


def calibration_text(bundle: Bundle, ids: Sequence[int] | None, count: int = WINDOWS) -> CalibrationText:
    """`count` windows of the user's text, spread over all of it; without one, of what the float32 bundle itself writes.

    Its own text is of its kind, and nobody has to be asked for some.
    """
    length = min(LENGTH, bundle.manifest.context_length)
    if ids is None:
        windows = own_texts(Session(bundle), begin_token(bundle.manifest), count, length)
    else:
        cut = cut_windows(ids, min(length, len(ids) // 2), len(ids))
        windows = [cut[i] for i in np.linspace(0, len(cut) - 1, min(count, len(cut))).astype(int)]
    kept = min(_MEASURED, len(windows) - 1)
    return CalibrationText("own" if ids is None else "given", tuple(windows[kept:]), tuple(windows[:kept]))


def measured(exact: Bundle, bundle: Bundle, text: CalibrationText) -> dict[str, Any]:
    """What `bundle` costs against float32, on the windows that nothing was chosen by: the manifest's quality."""
    found = evaluate(BundlePredictions(bundle), text.measured_on, BundlePredictions(exact))
    return {
        "kl_divergence": found.kl_divergence,  # nats
        "top1_agreement": found.top1_agreement,
        "greedy_agreement": found.greedy_agreement,
        "tokens": found.tokens,
        "text": text.source,
    }


def own_texts(session: Session, beginning: int, count: int, length: int) -> list[Ids]:
    """`count` windows (length,): `beginning` and what the model writes after it, drawn at temperature 1."""
    random, texts = np.random.default_rng(0), np.full((count, length), beginning, np.int64)
    for first in range(0, count, _AT_ONCE):
        rows = texts[first : first + _AT_ONCE]
        session.reset()
        for place in range(1, length):
            logits = session.forward(rows[:, place - 1 : place])[:, -1]  # (rows, V)
            # Gumbel's trick: the largest of logits and such noise is drawn with the softmax's probabilities.
            rows[:, place] = (logits + random.gumbel(size=logits.shape)).argmax(-1)
    return list(texts)


def calibrated(bundle: Bundle, windows: Sequence[Ids], say: Callable[[str], None]) -> ir.Model:
    """The float32 graph of `bundle` with scales migrated by the activations on `windows` (T,) of token ids.

    It is run against the graph as it was: should the logits change, for a form of graph that nobody thought of, then
    that one is returned, and `say` is told.
    """
    model = ir.load(bundle.common_graph)
    groups = find_groups(model)
    if not groups:
        return model
    folder, rows = bundle.common_graph.parent, -(-_ROWS // len(windows))
    wanted, samples = [group.activation for group in groups], list[dict[str, np.ndarray]]()
    with probing(model, folder, [names.LOGITS, *wanted]) as probe:
        for ids in windows:
            found = probe(ids)
            chosen = np.linspace(0, len(ids) - 1, min(rows, len(ids))).astype(int)
            samples.append({name: found[name][chosen] for name in wanted})
    migrate(model, groups, {name: np.concatenate([sample[name] for sample in samples]) for name in wanted})
    with probing(model, folder, [names.LOGITS]) as probe:
        after = probe(windows[-1])
    same = relative_difference(found[names.LOGITS], after[names.LOGITS]) <= _MAX_CHANGE  # NaN is not
    if same:
        return model
    say("warning: moving scales changed the logits of this model: its weights are quantized as they are")
    return ir.load(bundle.common_graph)


def begin_token(manifest: Manifest) -> int:
    """What a text of the model's begins with, or else the end token, or else the first of all."""
    known = [token for token in (manifest.bos_token_id, *manifest.eos_token_ids) if token is not None]
    return min(known[0] if known else 0, manifest.vocab_size - 1)


@contextlib.contextmanager
def probing(model: ir.Model, folder: Path, wanted: Sequence[str]) -> Iterator[Probe]:
    """Opens the graph to look at values inside it: the rows (T, K) float32 of each wanted one, on ids without a past.

    `folder` holds the weights file that the graph names; where some were changed since, all are written anew meanwhile.
    """
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    ends = list(model.graph.outputs)
    extra = [made[name] for name in wanted if made[name] not in ends]
    for value in extra:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.extend(extra)
    probe, data = folder / "probe.onnx", "probe.onnx_data"
    try:
        changed = any(_is_large_and_in_memory(value) for value in model.graph.initializers.values())
        ir.save(model, probe, external_data=data if changed else None)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        yield lambda ids, further=_NOTHING: _run(session, wanted, ids, further)
    finally:
        model.graph.outputs[:] = ends
        for value in extra:
            value.type = None
        probe.unlink(missing_ok=True)
        (folder / data).unlink(missing_ok=True)


def _run(session: Any, wanted: Sequence[str], ids: Ids, further: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name not in (names.INPUT_IDS, names.ATTENTION_MASK, names.POSITION_IDS, *further)
    }
    feeds = {
        names.INPUT_IDS: ids[None],
        names.ATTENTION_MASK: np.ones((1, len(ids)), np.int64),
        names.POSITION_IDS: np.arange(len(ids))[None],
    }
    found = session.run(list(wanted), feeds | past | dict(further))
    return {name: rows.reshape(-1, rows.shape[-1]) for name, rows in zip(wanted, found, strict=True)}


def _is_large_and_in_memory(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= INLINE_BYTES
