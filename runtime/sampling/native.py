"""pastkey's kernel library on logits, while they are in cache: the finite check, and the choice of a token.

The token is that of the stages. The library computes sums in another order. Where that could decide, it leaves the
token to the stages.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..settings import SamplingConfig
from .penalties import IdArray

_LEAST_TEMPERATURE: Final = 1e-3  # below, distances between logits may overflow


class _Draw(ctypes.Structure):
    """One call: PastkeyDraw of `kernels/csrc/draw.cc`."""

    _fields_ = (
        ("bytes", ctypes.c_uint64),
        ("logits", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("text", ctypes.c_void_p),
        ("text_size", ctypes.c_int64),
        ("biased", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("bias_count", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("repetition_penalty", ctypes.c_double),
        ("presence_penalty", ctypes.c_double),
        ("frequency_penalty", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("u", ctypes.c_double),
    )


@functools.cache
def _functions_of(library: str) -> Any:
    """The library with the functions for each token, or None if an older one lacks any."""
    found = ctypes.PyDLL(library)  # keeps Python's lock: a call is shorter than giving it away
    try:
        found.pastkey_kernels_draw.restype = ctypes.c_int64
        found.pastkey_kernels_draw.argtypes = [ctypes.c_void_p]
        found.pastkey_kernels_finite.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    except AttributeError:
        return None
    return found


def _address(array: npt.NDArray[Any]) -> int:
    """The address of an array's first number."""
    address: int = array.__array_interface__["data"][0]
    return address


class _Place:
    """The addresses of arrays that are mostly the whole of one memory. To ask numpy behind a run costs 40 us."""

    def __init__(self) -> None:
        self._known: tuple[Any, int] = (lambda: None, 0)  # replaced as a whole: threads may share a place

    def of(self, array: npt.NDArray[Any], *, begins: bool = False) -> int:
        """The address of an array in order. `begins`: it begins where the memory does that it is a view of."""
        memory = array if array.base is None else array.base
        if not isinstance(memory, np.ndarray) or not (begins or memory.size == array.size):
            return _address(array)
        known, address = self._known
        if known() is not memory:
            address = _address(array)
            self._known = weakref.ref(memory), address
        return address


class AllFinite:
    """Whether none of the results of a run is NaN or infinite. Threads may share it."""

    def __init__(self, library: str) -> None:
        """`library`: the path of pastkey's kernel library, or "" without one."""
        self._library = _functions_of(library) if library else None
        # The newest results, and how the library is asked about them. Replaced as a whole.
        self._known: tuple[Any, Callable[[], int]] = (lambda: None, lambda: 0)

    def __call__(self, found: npt.NDArray[np.float32]) -> bool:
        """Of logits or hidden states (B, T, ...)."""
        known, ask = self._known
        if known() is found:
            return bool(ask())
        if self._library is None or not found.flags.c_contiguous:
            # argmax and argmin find the extremes, or NaN, in a third of the time of max.
            return math.isfinite(found.item(found.argmax())) and math.isfinite(found.item(found.argmin()))
        place = ctypes.c_void_p(_address(found)), ctypes.c_int64(found.size)
        ask = functools.partial(self._library.pastkey_kernels_finite, *place)
        self._known = weakref.ref(found), ask
        return bool(ask())


class NativeDraw:
    """Chooses tokens by one config. Not thread-safe."""

    def __init__(self, config: SamplingConfig, draw: Any) -> None:
        self._call = draw
        bias, c = config.logit_bias or {}, config
        self._biased = np.fromiter(bias, np.int64, len(bias))
        self._biases = np.array(list(bias.values()), np.float64)
        self._last = c.penalty_last_n
        self._penalizes = c.repetition_penalty != 1 or bool(c.presence_penalty or c.frequency_penalty)
        self._text = _Place()
        self._logits: npt.NDArray[np.float32] | None = None  # the newest
        self._given = _Draw(
            bytes=ctypes.sizeof(_Draw),
            biased=_address(self._biased),
            biases=_address(self._biases),
            bias_count=len(bias),
            top_k=c.top_k,
            repetition_penalty=c.repetition_penalty,
            presence_penalty=c.presence_penalty,
            frequency_penalty=c.frequency_penalty,
            temperature=c.temperature,
            top_p=c.top_p,
            min_p=c.min_p,
        )
        self._address = ctypes.addressof(self._given)

    @classmethod
    def of(cls, library: str, config: SamplingConfig) -> NativeDraw | None:
        """None if the library is older or absent (""), and for a temperature near 0."""
        if 0 < config.temperature < _LEAST_TEMPERATURE:
            return None
        found = _functions_of(library) if library else None
        return None if found is None else cls(config, found.pastkey_kernels_draw)

    def __call__(self, logits: npt.NDArray[np.float32], text: IdArray | None, u: float) -> int | None:
        """The id that `u` draws from logits (V,), after the text (T,) of a History.

        None: it is in doubt, or the logits are not float32 in order.
        """
        given = self._given
        if logits is not self._logits:  # mostly those of the run before, overwritten
            if logits.dtype != np.float32 or not logits.flags.c_contiguous:
                return None
            self._logits, given.logits, given.size = logits, _address(logits), logits.size
        if self._penalizes and text is not None:
            given.text_size = text.size if self._last < 0 else min(self._last, text.size)
            given.text = self._text.of(text, begins=True) + (text.size - given.text_size) * text.itemsize
        given.u = u
        token: int = self._call(self._address)
        return token if token >= 0 else None
