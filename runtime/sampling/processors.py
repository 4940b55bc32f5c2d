"""The caller's own logits processors, with checks of their results."""

from __future__ import annotations

import numpy as np

from pastkey.errors import InputError

from ..options import LogitsProcessor
from .penalties import IdArray, Scores

_MOST = float(np.finfo(np.float32).max)


def apply_processor(logits: Scores, ids: IdArray, processor: LogitsProcessor) -> Scores:
    """Calls a logits processor on logits (V,) and returns its result.

    The processor gets copies, which it may write into: the ids (T,) int64 of the prompt and the new tokens, and the
    logits (V,) float32.

    Raises InputError if it raises or returns anything but floating-point numbers (V,) below infinity.
    """
    name = getattr(processor, "__qualname__", None) or type(processor).__qualname__
    given = logits.clip(-_MOST, _MOST).astype(np.float32)
    given[logits == -np.inf] = -np.inf
    try:
        found = processor(np.array(ids, np.int64), given)
    except Exception as error:
        raise InputError(f"logits_processor {name} raised {type(error).__name__}: {error}") from error
    wanted = f"logits of shape ({logits.size},) and a floating-point dtype were expected"
    if not isinstance(found, np.ndarray):
        raise InputError(f"logits_processor {name} returned {type(found).__name__}; {wanted}: return an array of numpy")
    if found.shape != logits.shape or not np.issubdtype(found.dtype, np.floating):
        raise InputError(f"logits_processor {name} returned {found.dtype} of shape {found.shape}; {wanted}")
    if not (found < np.inf).all():
        raise InputError(
            f"logits_processor {name} returned NaN or infinity; expected finite logits, or -inf for tokens that it bans"
        )
    return np.asarray(found)
