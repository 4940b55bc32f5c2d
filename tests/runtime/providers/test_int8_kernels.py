"""Which int8 kernels a CPU gets, by the flags of real ones, and where it is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from pastkey.__main__ import main
from pastkey.contract import names
from pastkey.contract.bundle import open_bundle
from pastkey.files.durable import write_json
from pastkey.files.folder import file_records, parse_records
from pastkey.precisions import PRECISIONS
from pastkey.runtime.commands.inspection import inspect
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


def test_a_mac_has_dot_products(monkeypatch):
    monkeypatch.setattr(int8_kernels.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(int8_kernels.platform, "machine", lambda: "arm64")
    assert int8_kernels.int8_kernels().name == "neon"


def test_a_system_that_does_not_say_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_kernels, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(int8_kernels.platform, "system", lambda: "Windows")
    assert int8_kernels.processor_flags() is None
    assert int8_kernels.int8_kernels().name == "unknown"


def test_float32_and_other_providers_take_none_of_them():
    assert int8_kernels_of("int8", "CPUExecutionProvider") == int8_kernels.int8_kernels()
    assert int8_kernels_of("fp32", "CPUExecutionProvider") is None
    assert int8_kernels_of("int8", "CUDAExecutionProvider") is None


# --- where it is said ---------------------------------------------------------------------------------------------
@pytest.fixture
def without_vnni(monkeypatch):
    found = choose_int8_kernels("x86_64", HASWELL.split())
    monkeypatch.setattr(int8_kernels, "int8_kernels", lambda: found)


@pytest.fixture
def int8_bundle(fused_bundle, tmp_path):
    """One that calls itself int8: what its weights are does not matter here."""
    folder = Path(shutil.copytree(fused_bundle.path, tmp_path / "int8"))
    (folder / PRECISIONS["fp32"].graph).rename(folder / PRECISIONS["int8"].graph)
    files = file_records(folder, [PRECISIONS["int8"].graph, names.LAST_LOGITS_GRAPH])
    manifest = dataclasses.replace(fused_bundle.manifest, precision="int8", files=parse_records(folder, files))
    write_json(folder / names.MANIFEST, manifest.to_json())
    return open_bundle(folder)


@pytest.mark.usefixtures("without_vnni")
def test_inspect_and_bench_say_it_of_an_int8_bundle_alone(int8_bundle, fused_bundle, capsys):
    path = str(int8_bundle.path)
    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out.count("\nint8 MatMuls here: AVX2 kernels, for want of VNNI") == 1
    assert main(["bench", path, "--prompt-tokens", "2", "--new-tokens", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["int8_kernels"]
    assert (found["name"], found["fast"]) == ("avx2", False)
    assert inspect(fused_bundle.path).int8_kernels is None
