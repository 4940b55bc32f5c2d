"""Checks in torch, before any trace, whether decoding with a grafted cache gives the uncached result.

A module with the contract's signature may still keep state outside attention, or take positions from elsewhere.
"""

from __future__ import annotations

from torch import Tensor, nn

from .observe import Observation, random_ids, run_cached, run_uncached

# Relative to the largest logit. Loose: torch's kernels differ by shape. A module with state exceeds it by far.
_TOLERANCE = 1e-3


def cache_works(module: nn.Module, observation: Observation, context_length: int) -> bool:
    """Runs the end of a sequence with the cached keys and values of its beginning, and compares the logits."""
    length = min(12, context_length)
    past = length // 2
    ids = random_ids(2, length, observation.vocab_size, seed=1)
    try:
        expected = run_uncached(module, ids).logits
        beginning = run_uncached(module, ids[:, :past])
        found = run_cached(module, beginning, ids[:, past:])
    except Exception:  # a user's module may raise anything at this length or these positions
        return False
    return _close(expected[:, past:], found) and _close(expected[:, :past], beginning.logits)


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-12))
