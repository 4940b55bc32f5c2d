"""A dry run in torch, before anything is traced: does decoding with a grafted cache give the uncached result?

A module that keeps the contract by its form may still keep state beside attention's, or take positions from elsewhere.
"""

from __future__ import annotations

from torch import Tensor, nn

from .observe import Observation, random_ids, run_cached, run_uncached

# Relative to the largest logit. Loose: torch's own kernels differ by shape; a module with state is far beyond.
_TOLERANCE = 1e-3


def cache_works(module: nn.Module, observation: Observation, context_length: int) -> bool:
    """Runs the end of a text alone with the cached keys and values of its beginning."""
    length = min(12, context_length)
    past = length // 2
    ids = random_ids(2, length, observation.vocab_size, seed=1)
    try:
        expected = run_uncached(module, ids).logits
        beginning = run_uncached(module, ids[:, :past])
        found = run_cached(module, beginning, ids[:, past:])
    except Exception:  # whatever a user's module raises for so many tokens, or for some that begin later
        return False
    return _close(expected[:, past:], found) and _close(expected[:, :past], beginning.logits)


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-12))
