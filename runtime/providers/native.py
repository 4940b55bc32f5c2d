"""pastkey's kernel library, an optional package: the operators of a bundle's native graph, on the CPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

from pastkey.contract.bundle import Bundle
from pastkey.errors import FallbackWarning, ProviderError, first_line
from pastkey.precisions import PRECISIONS

from . import placement as ep

_DISTRIBUTION, _PACKAGE = "pastkey-kernels", "pastkey_kernels"
_SWITCH = "PASTKEY_NATIVE"  # in the environment: 0 leaves the library alone


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


@functools.cache
def native_kernels() -> NativeKernels | None:
    """The kernel library of this Python, or None without one. Loads it, to ask for its level."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return None
    version, operators = "", 0
    try:
        package = importlib.import_module(_PACKAGE)
        version, operators, library = package.__version__, package.OPERATOR_VERSION, package.library_path()
        if (short := _missing_bytes(library)) > 0:  # to load it would end the process
            return NativeKernels(
                version, operators, refused=f"{library} was cut short by {short} bytes: install it again"
            )
        of_level = ctypes.CDLL(library).pastkey_kernels_level
        of_level.restype = ctypes.c_char_p
        level = of_level()
    except (OSError, ImportError, AttributeError) as error:
        return NativeKernels(version, operators, refused=f"it cannot be loaded: {first_line(error)}")
    if level is None:
        refused = (
            f"PASTKEY_KERNELS is {os.environ.get('PASTKEY_KERNELS')!r}, a level that this CPU or this build lacks: "
            "unset it, and the library chooses one"
        )
        return NativeKernels(version, operators, refused=refused)
    return NativeKernels(version, operators, level.decode(), library)


def _missing_bytes(library: str) -> int:
    """How many bytes the file has fewer than its wheel says; 0 without a wheel."""
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        return 0
    # Another copy may stand before that of the wheel on Python's path.
    recorded = next((file.size for file in files if Path(file.locate()).resolve() == Path(library)), None)
    return 0 if recorded is None else recorded - Path(library).stat().st_size


def kernels_for(bundle: Bundle, provider: str, asked: bool | None) -> NativeKernels | None:
    """The kernels that run a bundle, or None if onnxruntime's own do. Warns if a library is there and cannot be used.

    Args:
        bundle: The bundle.
        provider: onnxruntime's name of the first execution provider.
        asked: Whether they must (True), may (None) or must not (False) be used. The environment variable PASTKEY_NATIVE
            set to 0 makes False of None.

    Raises:
        ProviderError: They must be used and cannot, or PASTKEY_NATIVE is neither 0 nor 1.
    """
    switch = os.environ.get(_SWITCH, "")
    if asked is None and switch not in ("", "0", "1"):
        raise ProviderError(f"{_SWITCH} is {switch!r}; 0 was expected, for onnxruntime's kernels, or 1")
    if asked is False or (asked is None and switch == "0"):
        return None
    why, found, manifest = "", None, bundle.manifest
    if bundle.native_graph is None:
        why = f"{bundle.path} has no native graph"
        if manifest.native_left_out:
            why += f", since its export found that {manifest.native_left_out}"
        elif PRECISIONS[manifest.precision].quantized and manifest.graph == "fused" and manifest.target == "cpu":
            path = shlex.quote(str(bundle.path))
            why += f": make a bundle with one by  pastkey upgrade {path} --out NEW  if its sizes allow one"
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
        return found
    if asked:
        raise ProviderError(f"native is True, and the native kernels cannot be used: {why}")
    if found is not None:
        told = f"the native kernels cannot be used, so onnxruntime's run {bundle.path}: {why}"
        warnings.warn(told, FallbackWarning, stacklevel=2)
    return None
