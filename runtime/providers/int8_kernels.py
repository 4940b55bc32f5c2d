"""Which int8 kernels onnxruntime uses on this CPU, and what slower ones cost.

onnxruntime does not report them, so the rules of its source are repeated here: MLAS_PLATFORM in
onnxruntime/core/mlas/lib/platform.cpp selects a table of kernels, and MlasIsQNBitGemmAvailable in qnbitgemm.cpp tests
whether the table has a kernel for 8-bit weights. Without one, MatMulNBits unpacks all of its weights to float32 at
every run.
"""

from __future__ import annotations

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pastkey.precisions import PRECISIONS

from .placement import CPU

_CPUINFO = Path("/proc/cpuinfo")  # Linux and Android
_FLAG_LINES = ("flags", "Features")  # on x86, and on ARM


@dataclass(frozen=True)
class Int8Kernels:
    """The kernels for the MatMuls of an int8 bundle on a CPU."""

    name: str  # "avx512_vnni", "avx_vnni", "avx512", "avx2", "neon", "none" or "unknown"
    fast: bool | None  # whether they have instructions for int8 dot products; None if unknown
    note: str  # a description with the cost


_SLOWER = "for want of VNNI: decode is as fast as with VNNI, prefill takes 1.6 times as long, longer than in float32"
# The figures are those of docs/performance.md, "Processors without VNNI".
_KNOWN = {
    kernels.name: kernels
    for kernels in (
        Int8Kernels("avx512_vnni", True, "AVX512-VNNI kernels, the fastest"),
        Int8Kernels("avx_vnni", True, "AVX-VNNI kernels; their speed is not measured"),
        Int8Kernels("avx512", False, f"AVX512 kernels, {_SLOWER}"),
        Int8Kernels("avx2", False, f"AVX2 kernels, {_SLOWER}"),
        Int8Kernels("neon", True, "NEON kernels with dot products; their speed is not measured"),
        Int8Kernels(
            "none",
            False,
            "no kernel, for want of AVX2 or of NEON's dot products: all weights are unpacked at every run, and decode "
            "takes more than ten times as long as in float32",
        ),
        Int8Kernels("unknown", None, "unknown kernels: this system does not say what its CPU has"),
    )
}


def int8_kernels() -> Int8Kernels:
    """The kernels of this CPU."""
    return choose_int8_kernels(platform.machine(), processor_flags())


def int8_kernels_of(precision: str, provider: str) -> Int8Kernels | None:
    """The kernels of a bundle's MatMuls here; None for float32 or another provider.

    int4 also multiplies by int8 activations, with kernels of the same instructions, and its output head is int8.

    `provider`: onnxruntime's name of the session's first provider.
    """
    return int8_kernels() if PRECISIONS[precision].quantized and provider == CPU else None


def choose_int8_kernels(machine: str, flags: Collection[str] | None) -> Int8Kernels:
    """`machine`: as `platform.machine()`. `flags`: Linux's names of CPU features, or None if unknown."""
    return _KNOWN["unknown" if flags is None else _choose(machine.lower(), frozenset(flags))]


def _choose(machine: str, flags: frozenset[str]) -> str:
    """Tests in onnxruntime's order. A later match overrides an earlier one."""
    if machine in ("x86_64", "amd64"):
        found = "none"
        if {"avx2", "fma"} <= flags:
            found = "avx_vnni" if "avx_vnni" in flags else "avx2"
            if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
                found = "avx512_vnni" if "avx512_vnni" in flags else "avx512"
        return found
    if machine in ("aarch64", "arm64"):
        return "neon" if "asimddp" in flags else "none"
    return "unknown"


def processor_flags() -> frozenset[str] | None:
    """Linux's names of this CPU's features; None if unknown."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return frozenset({"asimddp"})  # all Apple CPUs of Macs have dot products
    try:
        return read_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def read_cpuinfo(text: str) -> frozenset[str] | None:
    """The flags of the first CPU in /proc/cpuinfo, or None if there is no such line."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in _FLAG_LINES:
            return frozenset(value.split())
    return None
