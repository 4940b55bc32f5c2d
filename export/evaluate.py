"""How far two models' predictions are apart, in the field's own figures, and a text to measure it on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pastkey.runtime import Generation, SamplingConfig, Session

Logits = npt.NDArray[np.float32]


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """log p over the last axis, in float64: differences of 1e-9 nats are measured here."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def kl_divergence(reference: Logits, logits: Logits) -> float:
    """KL(reference || other) in nats, mean over positions. Both (..., V)."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float(np.maximum((np.exp(p) * (p - q)).sum(-1), 0).mean())


def top1_agreement(reference: Logits, logits: Logits) -> float:
    """Share of positions whose most likely token is the same, 0 to 1. Both (..., V)."""
    return float((reference.argmax(-1) == logits.argmax(-1)).mean())


def relative_difference(reference: Logits, logits: Logits) -> float:
    """max |difference| / max |reference|: 1e-5 on logits of 44 is 4.4e-4."""
    largest = float(np.abs(reference).max())
    return float(np.abs(reference - logits).max()) / max(largest, float(np.finfo(np.float32).tiny))


def own_text(session: Session, beginning: list[int], length: int) -> list[int]:
    """`length` token ids: `beginning`, and what the bundle itself writes after it, drawn at temperature 1.

    Its own text is of its kind, where random ids would be of none, and nobody has to be asked for some.
    """
    sampling = SamplingConfig(temperature=1.0, seed=0)
    return [*beginning, *Generation(session, beginning, max_new_tokens=length - len(beginning), sampling=sampling)]
