"""How far apart two results of one computation are, and the limits of each comparison: of the largest number.

`measure/verify.py` and `pastkey/precisions.py` have the limits of a bundle. These are the others.

| what                                                 | limit      | why                                              |
|------------------------------------------------------|------------|--------------------------------------------------|
| logits of a module in two calls, of a text in parts, | LOGITS     | torch's and onnxruntime's kernels differ by      |
| of a graph with holes in its past                    |            | shape                                            |
| logits of the float32 graph before and after         | LOGITS     | exact but for the rounding of every layer        |
| smoothing                                            |            |                                                  |
| keys that are turned back by some tokens             | LOGITS +   | each token adds the rounding of an angle in      |
|                                                      | PER_TOKEN  | float32; learned positions are far off           |
| keys and values of a latent row, by its matrices     | NUMBERS    | one product in two orders                        |
| logits of the ORT format                             | NUMBERS    | the same operators, optimised ahead              |
| rows that a changed row does not reach; angles of    | UNCHANGED  | computed from the same numbers                   |
| positions in a shorter text                          |            |                                                  |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pastkey.runtime.engine.golden import drawn_of

if TYPE_CHECKING:
    from torch import Tensor

LOGITS, NUMBERS, UNCHANGED = 1e-4, 1e-5, 1e-6
PER_TOKEN = 4e-7
_TINY = 1e-12  # the least that a difference is divided by

Numbers = npt.NDArray[np.generic]


def relative_difference(reference: Numbers | Tensor, found: Numbers | Tensor) -> float:
    """Returns max |difference| / max |reference|: 1e-5 on numbers of 44 is 4.4e-4. NaN if one is NaN."""
    expected, other = np.asarray(reference), np.asarray(found)
    return float(np.abs(expected - other).max(initial=0) / max(np.abs(expected).max(initial=0), _TINY))


def logits_difference(reference: Numbers | Tensor, found: Numbers | Tensor) -> float:
    """As `relative_difference` of logits (..., V).

    Logits far below the largest of their row, as those of unused tokens that a model bans by -1e9, do not count.
    """
    expected, other = np.asarray(reference), np.asarray(found)
    off = largest = 0.0
    for one, two in zip(*(logits.reshape(-1, logits.shape[-1]) for logits in (expected, other)), strict=True):
        drawn = drawn_of(one)  # row by row, for the core's cache
        either = drawn | drawn_of(two)
        off = float(np.maximum(off, np.abs(one[either] - two[either]).max(initial=0)))
        largest = float(np.maximum(largest, np.abs(one[drawn]).max(initial=0)))
    return off / max(largest, _TINY)
