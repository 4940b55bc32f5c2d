"""The ids of a growing sequence as one array, extended in place for each token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class History:
    """The array of one list of ids, to which the caller only appends."""

    def __init__(self) -> None:
        self._ids: Sequence[int] | None = None
        self._array: Ids = np.empty(256, np.int64)
        self._length = 0

    def of(self, ids: Sequence[int]) -> Ids:
        """`ids` as a read-only array (T,). Starts over for another list or a shorter one."""
        known = self._length if ids is self._ids and len(ids) >= self._length else 0
        if len(ids) > self._array.size:
            grown = np.empty(2 * len(ids), np.int64)
            grown[:known] = self._array[:known]
            self._array = grown
        self._array[known : len(ids)] = ids[known:]
        self._ids, self._length = ids, len(ids)
        view = self._array[: len(ids)]
        view.flags.writeable = False
        return view
