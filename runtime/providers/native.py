"""pastkey's kernel library, an optional package: the operators of a bundle's native graph, on the CPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from dataclasses import dataclass

from pastkey.contract import names
from pastkey.contract.bundle import Bundle
from pastkey.errors import FallbackWarning, ProviderError, first_line
from pastkey.precisions import PRECISIONS

from . import placement as ep

_PACKAGE = "pastkey_kernels"
_SWITCH = "PASTKEY_NATIVE"  # in the environment: 0 does not use the library


@dataclass(frozen=True)
class NativeKernels:
    """An installed kernel library."""

    version: str  # of its package; "" if that cannot be imported
    operators: int = 0  # version of its operators; graphs of earlier ones run as well
    level: str = ""  # the instructions in use, such as "avx512"
    library: str = ""  # its absolute path
    refused: str = ""  # why it cannot be used here

    def __str__(self) -> str:
        return f"native {self.version}, {self.level}"

    @property
    def slow(self) -> bool:
        """Whether nobody named these, which are the tests' reference: onnxruntime's read prompts 11 times as fast."""
        return self.level == names.PORTABLE_LEVEL and os.environ.get("PASTKEY_KERNELS") != names.PORTABLE_LEVEL


@functools.cache
def native_kernels() -> NativeKernels | None:
    """The kernel library of this Python, or None without one. Loads it, to ask for its level."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return None
    version, operators = "", 0
    try:
        package = importlib.import_module(_PACKAGE)
        version, library = package.__version__, package.library_path()
        loaded = ctypes.CDLL(library)
        loaded.pastkey_kernels_level.restype = ctypes.c_char_p
        operators, level = loaded.pastkey_kernels_operators(), loaded.pastkey_kernels_level()
    except (OSError, ImportError, AttributeError) as error:
        return NativeKernels(version, operators, refused=f"it cannot be loaded: {first_line(error)}")
    if level is None:
        refused = (
            f"PASTKEY_KERNELS is {os.environ.get('PASTKEY_KERNELS')!r}, a level that this CPU or this build lacks: "
            "unset it, and the library chooses one"
        )
        return NativeKernels(version, operators, refused=refused)
    return NativeKernels(version, operators, level.decode(), library)


def kernels_for(bundle: Bundle, provider: str, asked: bool | None) -> NativeKernels | None:
    """The kernels that run a bundle, or None if onnxruntime's own do. Warns if a library is there and cannot be used.

    Args:
        bundle: The bundle.
        provider: onnxruntime's name of the first execution provider.
        asked: Whether they must (True), may where they are faster (None) or must not (False) be used. The environment
            variable PASTKEY_NATIVE set to 0 makes False of None.

    Raises:
        ProviderError: They must be used and cannot, or PASTKEY_NATIVE is not 0.
    """
    switch = os.environ.get(_SWITCH, "")
    if asked is None and switch not in ("", "0"):
        raise ProviderError(
            f"{_SWITCH} is {switch!r}; 0 was expected, for onnxruntime's kernels: the native ones run where they can "
            "without it, and  load(..., native=True)  requires them"
        )
    if asked is False or (asked is None and switch == "0"):
        return None
    why, found, manifest = "", None, bundle.manifest
    if bundle.native_graph is None:
        why = f"{bundle.path} has no native graph"
        if manifest.native_left_out:
            why += f", since its export found that {manifest.native_left_out}"
        elif PRECISIONS[manifest.precision].quantized and manifest.graph == "fused" and manifest.target == "cpu":
            why += ", since no operator of the model has a kernel"
        else:
            why += ", which is for int8 and int4 weights, the fused graph and the target cpu"
    elif provider != ep.CPU:
        why = f"they run on the CPU, and the provider is {ep.short_name(provider)!r}"
    elif (found := native_kernels()) is None:
        why = "the kernel library is not installed: in a checkout of pastkey, type  pip install ./kernels"
    elif found.refused:
        why = found.refused
    elif manifest.native is not None and found.operators < manifest.native:
        why = (
            f"the installed library has version {found.operators} of the operators, and the bundle needs "
            f"{manifest.native}: install the library of a newer pastkey"
        )
    if not why:
        return None if found is not None and found.slow and not asked else found
    if asked:
        raise ProviderError(f"native is True, and the native kernels cannot be used: {why}")
    if found is not None:
        told = f"the native kernels cannot be used, so onnxruntime's run {bundle.path}: {why}"
        warnings.warn(told, FallbackWarning, stacklevel=2)
    return None
