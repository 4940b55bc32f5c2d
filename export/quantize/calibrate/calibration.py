"""The calibration text, and what is chosen by it: smoothed weights, by the activations on its windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import InputError
from pastkey.files.tokenizer_file import open_tokenizer
from pastkey.runtime import Engine
from pastkey.runtime.text.codec import TextCodec

from ...graph.write.output_head import output_head
from ...measure.evaluate import evaluate
from ...measure.metrics import Ids, relative_difference
from ...measure.predictors import BundlePredictor
from ...measure.texts import cut_windows, encode_file, self_generated_texts, start_token
from ...progress import SILENT, Progress
from .activations import probing
from .smoothing import smooth
from .smoothing_groups import find_groups

LENGTH = 256  # tokens of a window of calibration text, where the context has room for them
MIN_TOKENS = 64  # of a calibration file: fewer say nothing about the activations of other texts
_MONOTONOUS = 0.9  # of a text, as one and the same token: a word over and over, or a script the tokenizer cannot read
_MEASURED = 2  # windows that are kept apart, to measure on
# Of the largest logit. Smoothing rounds every weight anew, by 6e-8; a wrong division changes everything.
_MAX_CHANGE = 1e-4
_SAMPLES = 512  # positions whose activations are kept, spread over the text


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids (T,): some to choose by, and others to measure on."""

    source: str  # "own", or "given" by the user
    calibration_set: tuple[Ids, ...]
    held_out_set: tuple[Ids, ...]


def read_calibration(file: str | Path, tokenizer: bytes | None, windows: int) -> list[int]:
    """The token ids of the user's calibration text. Raises MissingFileError or InputError where it cannot be used."""
    if tokenizer is None:
        raise InputError(
            "this model has no tokenizer to read a calibration text with: give --tokenizer FILE, or leave out "
            "--calibration for text of the model's own"
        )
    ids = encode_file(file, TextCodec(open_tokenizer(Tokenizer, tokenizer, "the model's tokenizer")), MIN_TOKENS)
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


def calibration_text(
    bundle: Bundle, ids: Sequence[int] | None, count: int, progress: Progress = SILENT
) -> CalibrationText:
    """`count` windows of the user's text, spread over all of it; without one, of what the float32 bundle itself writes.

    Its own text is of its kind, and nobody has to be asked for some.
    """
    length = min(LENGTH, bundle.manifest.context_length)
    if ids is None:
        windows = self_generated_texts(Engine(bundle), start_token(bundle.manifest), count, length, progress)
    else:
        cut = cut_windows(ids, min(length, len(ids) // 2), len(ids))
        windows = [cut[i] for i in np.linspace(0, len(cut) - 1, min(count, len(cut))).astype(int)]
    kept = min(_MEASURED, len(windows) - 1)
    return CalibrationText("own" if ids is None else "given", tuple(windows[kept:]), tuple(windows[:kept]))


def measured(fp32: Bundle, bundle: Bundle, text: CalibrationText) -> dict[str, Any]:
    """What `bundle` costs against float32, on the windows that nothing was chosen by: the manifest's quality."""
    found = evaluate(BundlePredictor(bundle), text.held_out_set, BundlePredictor(fp32))
    return {
        "kl_divergence": found.kl_divergence,  # nats
        "top1_agreement": found.top1_agreement,
        "greedy_agreement": found.greedy_agreement,
        "tokens": found.tokens,
        "text": text.source,
    }


def calibrated(bundle: Bundle, windows: Sequence[Ids], progress: Progress = SILENT) -> ir.Model:
    """The float32 graph of `bundle`, smoothed by the activations on `windows` (T,) of token ids.

    It is run against the graph as it was: where the logits differ, that one is returned, with a warning.
    """
    model = ir.load(bundle.all_logits_graph)
    groups = find_groups(model)
    if bundle.manifest.hidden_size is not None:  # whose channels are the model's own
        head = output_head(model)
        groups = [group for group in groups if all(reader.node is not head for reader in group.readers)]
    if not groups:
        return model
    folder, count = bundle.all_logits_graph.parent, -(-_SAMPLES // len(windows))
    wanted, samples = [group.activation for group in groups], list[dict[str, np.ndarray]]()
    with probing(model, folder, [names.LOGITS, *wanted]) as probe:
        for ids in windows:
            found = probe(ids)
            chosen = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
            samples.append({name: found[name][chosen] for name in wanted})
    smooth(model, groups, {name: np.concatenate([sample[name] for sample in samples]) for name in wanted})
    with probing(model, folder, [names.LOGITS]) as probe:
        after = probe(windows[-1])
    same = relative_difference(found[names.LOGITS], after[names.LOGITS]) <= _MAX_CHANGE  # NaN is not
    if same:
        return model
    progress.warn("smoothing changed the logits of this model: its weights are quantized as they are")
    return ir.load(bundle.all_logits_graph)
