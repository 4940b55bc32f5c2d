"""Which int8 kernels a CPU gets, by the flags of real ones, and where it is said."""

from __future__ import annotations

import pytest

from pastkey.runtime.providers import int8_kernels
from pastkey.runtime.providers.int8_kernels import choose_int8_kernels, int8_kernels_of, read_cpuinfo

# From /proc/cpuinfo, shortened to what has to do with vectors.
HASWELL = "sse4_2 fma avx avx2"
SKYLAKE_SERVER = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
CASCADE_LAKE = f"{SKYLAKE_SERVER} avx512_vnni"
ALDER_LAKE = f"{HASWELL} avx_vnni"
KNIGHTS_LANDING = f"{HASWELL} avx512f avx512pf avx512er avx512cd"
SANDY_BRIDGE = "sse4_2 avx"
CORTEX_A72 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
NEOVERSE_N1 = "fp asimd evtstrm aes fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
NEOVERSE_V1 = f"{NEOVERSE_N1} sve i8mm bf16"


@pytest.mark.parametrize(
    ("machine", "flags", "name", "fast"),
    [
        ("x86_64", HASWELL, "avx2", False),
        ("AMD64", SKYLAKE_SERVER, "avx512", False),
        ("x86_64", CASCADE_LAKE, "avx512_vnni", True),
        ("x86_64", ALDER_LAKE, "avx_vnni", True),
        ("x86_64", KNIGHTS_LANDING, "avx2", False),
        ("x86_64", SANDY_BRIDGE, "none", False),
        ("aarch64", CORTEX_A72, "none", False),
        ("aarch64", NEOVERSE_N1, "neon", True),
        ("arm64", NEOVERSE_V1, "neon", True),
        ("riscv64", "", "unknown", None),
        ("x86_64", None, "unknown", None),
    ],
)
def test_the_kernels_are_those_that_onnxruntime_chooses(machine, flags, name, fast):
    found = choose_int8_kernels(machine, None if flags is None else flags.split())
    assert (found.name, found.fast) == (name, fast)


def test_flags_are_read_as_linux_writes_them():
    x86 = (
        "processor\t: 0\nmodel name\t: A CPU: 2 GHz\nflags\t\t: fpu avx2 fma\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n"
    )
    assert read_cpuinfo(x86) == frozenset({"fpu", "avx2", "fma"})
    arm = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0c\n"
    assert read_cpuinfo(arm) == frozenset({"fp", "asimd", "asimddp"})
    assert read_cpuinfo("processor\t: 0\nhart\t: 2\nisa\t: rv64imafdc\n") is None


def test_float32_and_other_providers_take_none_of_them():
    assert int8_kernels_of("int8", "CPUExecutionProvider") == int8_kernels.int8_kernels()
    assert int8_kernels_of("fp32", "CPUExecutionProvider") is None
    assert int8_kernels_of("int8", "CUDAExecutionProvider") is None


# --- where it is said ---------------------------------------------------------------------------------------------
