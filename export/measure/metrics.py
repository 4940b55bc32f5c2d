"""Standard metrics: how well a model predicts a text, and how far two models' predictions are apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pastkey.errors import NumericsError
from pastkey.runtime.engine.engine import HiddenStates, Ids, Logits

Probabilities = npt.NDArray[np.float32]
LogProbabilities = npt.NDArray[np.float64]

_ROWS = 8  # positions at once: more of a large vocabulary leave the core's cache
_FAR = 60.0  # nats: e to it weighs the float32 probabilities lost by underflow, 1e-38, less than 1e-12


# --- logits -------------------------------------------------------------------------------------------------------
def log_softmax(logits: Logits) -> LogProbabilities:
    """Returns log p over the last axis, in float64, since differences of 1e-9 nats are measured."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def softmax(logits: Logits) -> Probabilities:
    """Returns p over the last axis, the input of `kl_by_position`."""
    return np.exp(log_softmax(logits)).astype(np.float32)


def kl_by_position(reference: Logits, p: Probabilities, logits: Logits) -> npt.NDArray[np.float64]:
    """Returns KL(reference || other) in nats of each position, from (..., V) and the reference's softmax `p`.

    With d the differences of the logits minus their mean under p, KL = log sum p e^d = log(1 + sum p (e^d - 1 - d)).
    All terms of this sum are positive, so nothing cancels, however small the KL is.
    """
    d = logits - reference
    d -= np.einsum("...v,...v->...", p, d)[..., None]
    if d.max(initial=0) > _FAR:
        log_p = log_softmax(reference)
        return np.asarray(np.maximum((np.exp(log_p) * (log_p - log_softmax(logits))).sum(-1), 0))
    wide = d.astype(np.float64)
    terms = np.expm1(wide)
    terms -= wide
    return np.asarray(np.log1p(np.einsum("...v,...v->...", p, terms)))


def kl_divergence(reference: Logits, logits: Logits) -> float:
    """Returns KL(reference || other) in nats, mean over positions. Both (..., V)."""
    rows = zip(*(each.reshape(-1, each.shape[-1]) for each in (reference, logits)), strict=True)
    return float(np.mean([kl_by_position(one, softmax(one), other) for one, other in rows]))


def top1_agreement(reference: Logits, logits: Logits) -> float:
    """Returns the share of positions whose most likely token is the same, 0 to 1. Both (..., V)."""
    return float((reference.argmax(-1) == logits.argmax(-1)).mean())


def cosine_distance(reference: HiddenStates, states: HiddenStates) -> float:
    """Returns 1 - cosine, mean over positions. Both (..., H). A vector of zeros is at distance 1 from any other."""
    a, b = reference.astype(np.float64), states.astype(np.float64)
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines = np.einsum("...h,...h->...", a, b) / np.maximum(sizes, np.finfo(np.float64).tiny)
    return float(np.where((a == b).all(-1), 0.0, np.maximum(1 - cosines, 0)).mean())


# --- texts --------------------------------------------------------------------------------------------------------
def perplexity(loss: float) -> float:
    """Returns exp of a mean loss in nats per token: the number of equally likely tokens with the same loss.

    Raises:
        NumericsError: The exponential of the loss overflows a float.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        raise NumericsError(
            f"the model loses {loss:.3g} nats per token, so its perplexity overflows: its weights are damaged"
        ) from None


def agreeing_tokens(own: Iterable[int], tokens: Iterable[int]) -> int:
    """Returns how many tokens precede the first that differs. Reads no token of `own` after that one."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, tokens, strict=False)))


@dataclass
class Sums:
    """Sums over the windows so far; losses and KL in nats."""

    loss: float = 0.0
    reference_loss: float = 0.0
    kl: float = 0.0
    same_top: int = 0
    tokens: int = 0
    predicted: int = 0  # all tokens but the first of each window

    def add(self, ids: Ids, logits: Logits, expected: Logits | None = None) -> None:
        """Adds one window (T,) with its logits (T, V), and the reference's."""
        for start in range(0, ids.size, _ROWS):
            rows = slice(start, start + _ROWS)
            following = ids[start + 1 : start + _ROWS + 1]  # one fewer than rows at the window's end
            self.loss += _loss(log_softmax(logits[rows]), following)
            if expected is not None:
                log_p = log_softmax(expected[rows])
                self.reference_loss += _loss(log_p, following)
                p = np.exp(log_p).astype(np.float32)
                self.kl += float(kl_by_position(expected[rows], p, logits[rows]).sum())
                self.same_top += int((expected[rows].argmax(-1) == logits[rows].argmax(-1)).sum())
        self.tokens += ids.size
        self.predicted += ids.size - 1


def _loss(log_probabilities: LogProbabilities, following: Ids) -> float:
    """Returns -log p in nats, summed, of the token that follows each position (T, V)."""
    return -float(log_probabilities[np.arange(following.size), following].sum())
