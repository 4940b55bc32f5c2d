"""Execution providers: the hardware back ends of onnxruntime, by short names, without silent fall-back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pastkey.errors import ProviderError

from .ort import onnxruntime

CPU = "CPUExecutionProvider"


# Reaches a remote service with graphs made for it; a decoder asked to run there would run on the CPU in silence.
_NOT_HARDWARE = {"AzureExecutionProvider"}


@dataclass(frozen=True)
class Known:
    """What is known of a provider, whether or not it is here."""

    name: str  # onnxruntime's name
    hardware: str
    source: str  # what brings it


_SOURCE_BUILD = "onnxruntime built from source with"

KNOWN = {
    "cpu": Known(CPU, "any processor", "pip install 'pastkey[cpu]'"),
    "cuda": Known("CUDAExecutionProvider", "NVIDIA GPUs", "pip install 'pastkey[gpu]', with CUDA and cuDNN"),
    "tensorrt": Known("TensorrtExecutionProvider", "NVIDIA GPUs", "pip install 'pastkey[gpu]', with TensorRT"),
    "openvino": Known("OpenVINOExecutionProvider", "Intel CPUs, GPUs, NPUs", "pip install 'pastkey[openvino]'"),
    "webgpu": Known("WebGpuExecutionProvider", "GPUs by Vulkan, Metal or D3D12", "pip install 'pastkey[webgpu]'"),
    "qnn": Known("QNNExecutionProvider", "Qualcomm NPUs", "pip install 'pastkey[qnn]'"),
    "coreml": Known("CoreMLExecutionProvider", "Apple GPUs and neural engines", "pip install 'pastkey[cpu]' on macOS"),
    "dml": Known("DmlExecutionProvider", "GPUs under Windows", "pip install onnxruntime-directml on Windows"),
    "migraphx": Known("MIGraphXExecutionProvider", "AMD GPUs", "pip install onnxruntime-migraphx, with ROCm"),
    "rocm": Known("ROCMExecutionProvider", "AMD GPUs, of older releases", f"{_SOURCE_BUILD} --use_rocm"),
    "xnnpack": Known("XnnpackExecutionProvider", "ARM processors", f"{_SOURCE_BUILD} --use_xnnpack"),
    "nnapi": Known("NnapiExecutionProvider", "Android accelerators", "onnxruntime for Android"),
    "cann": Known("CANNExecutionProvider", "Huawei Ascend NPUs", "pip install onnxruntime-cann"),
}

# Where a bundle made for a target runs when nothing else is asked for.
_DEFAULT_OF_TARGET = {"cuda": "cuda", "webgpu": "webgpu"}

# Providers whose memory the cache lives in. With any other, tensors are handed over in the processor's memory.
_DEVICE_OF = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}

Choice = str | tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Device:
    """One line of `pastkey devices`."""

    short_name: str
    name: str  # onnxruntime's name
    hardware: str
    available: bool
    note: str  # what brings it when it is absent, else ""


def devices() -> list[Device]:
    """Every known provider, and those that this onnxruntime has beyond them; available ones first."""
    here = available()
    rows = [
        Device(short, known.name, known.hardware, known.name in here, "" if known.name in here else known.source)
        for short, known in KNOWN.items()
    ]
    known_names = {known.name for known in KNOWN.values()}
    rows += [Device(short_name(name), name, "", True, "") for name in here if name not in known_names]
    return sorted(rows, key=lambda device: not device.available)


def resolve(choice: Choice | Sequence[Choice] | None, target: str = "cpu") -> list[tuple[str, dict[str, Any]]]:
    """The providers to open a session with, in order of preference, the CPU last.

    `choice` is a short name ("cuda"), onnxruntime's name, a pair of a name and its options, a sequence of these, or
    None: the bundle's target decides. Raises ProviderError for one that does not exist here.
    """
    if choice is None:
        choice = _DEFAULT_OF_TARGET.get(target, "cpu")
        reason = f"the bundle was made for {target}; "
    else:
        reason = ""
    pair = isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], dict)
    # mypy cannot know what `pair` has looked at.
    choices: Sequence[Choice] = [choice] if isinstance(choice, str) or pair else choice  # type: ignore[list-item, assignment]
    here = available()
    chosen: dict[str, dict[str, Any]] = {}
    for entry in choices:
        asked, options = (entry, {}) if isinstance(entry, str) else entry
        name = full_name(asked)
        if name not in here:
            known = KNOWN.get(short_name(name)) if name else None
            what = f"the execution provider {asked!r} " + ("is not on this machine" if known else "is unknown")
            remedy = f"; it comes with {known.source}" if known else ""
            raise ProviderError(f"{reason}{what}; here: {', '.join(map(short_name, here))}{remedy}")
        chosen[name] = dict(options)
    chosen.setdefault(CPU, {})  # shapes and sizes are computed there whatever else runs
    return list(chosen.items())


def require_target(target: str) -> None:
    """Raises ProviderError where a bundle made for `target` cannot be run here, as an export does to prove it."""
    wanted = _DEFAULT_OF_TARGET.get(target, "cpu")
    try:
        resolve(wanted)
    except ProviderError as error:
        raise ProviderError(
            f"--target {target} is proved by running the bundle there, but {error}; export where it is, or with "
            "--target cpu"
        ) from None


def require_active(wanted: Sequence[tuple[str, dict[str, Any]]], active: Sequence[str]) -> None:
    """Raises ProviderError when onnxruntime opened a session without a provider that was asked for."""
    for name, _ in wanted:
        if name not in active:
            raise ProviderError(
                f"onnxruntime could not start the execution provider {short_name(name)!r}, for want of a driver or a "
                f"library (its own message says which); ask for one that starts: {', '.join(map(short_name, active))}"
            )


def cache_device(active: Sequence[str]) -> str:
    """Where the cache of a session with these providers lives: onnxruntime's device name."""
    return _DEVICE_OF.get(active[0], "cpu")


def available() -> list[str]:
    """The providers of this onnxruntime, by its names."""
    return [name for name in onnxruntime.get_available_providers() if name not in _NOT_HARDWARE]


def full_name(name: str) -> str:
    """onnxruntime's name of a provider, or "" for an unknown one. Upper and lower case do not matter."""
    wanted = name.lower().removesuffix("executionprovider")
    by_name = {short_name(full): full for full in available()}
    return KNOWN[wanted].name if wanted in KNOWN else by_name.get(wanted, "")


def short_name(name: str) -> str:
    """The name a user types: "CUDAExecutionProvider" -> "cuda"."""
    return name.removesuffix("ExecutionProvider").lower()
