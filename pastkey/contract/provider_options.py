"""The options of execution providers that a bundle's manifest may set, and their values.

An option reaches the provider's own code, and some of them load a library, write files, or use an address of this
process (`backend_path` and `op_packages` of QNN, `cache_dir` of OpenVINO, `gpu_external_alloc` of CUDA). A manifest may
be untrusted, so it may set only the options below: numbers and fixed words. Options that the user gives to `load` or
with --provider-option are not restricted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ..errors import IntegrityError
from ..values import shown

# Fixed words, a range of whole numbers, or a pattern.
Values = tuple[str, ...] | range | re.Pattern[str]

_SWITCH: Final = ("0", "1")
_TRUTH: Final = ("true", "false", "True", "False")
_DEVICE_ID: Final = range(256)
_BYTES: Final = range(1, 2**63)
_BUFFER_CACHE: Final = ("disabled", "lazyRelease", "simple", "bucket")
_DEVICE: Final = "(CPU|GPU|NPU)([.][0-9]{1,2})?"  # of OpenVINO
HTP_ARCHS: Final = ("69", "73", "75", "79", "81")  # 68 lacks float16; QNN treats an unknown one as 68

# By the provider's short name. A manifest may set no option of a provider without a row.
OPTIONS: Final[Mapping[str, Mapping[str, Values]]] = {
    "cuda": {
        "device_id": _DEVICE_ID,
        "gpu_mem_limit": _BYTES,
        "arena_extend_strategy": ("kNextPowerOfTwo", "kSameAsRequested"),
        "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
        "cudnn_conv_use_max_workspace": _SWITCH,
        "do_copy_in_default_stream": _SWITCH,
        "enable_cuda_graph": _SWITCH,
        "enable_skip_layer_norm_strict_mode": _SWITCH,
        "prefer_nhwc": _SWITCH,
        "use_tf32": _SWITCH,
    },
    "openvino": {
        "device_type": re.compile(f"{_DEVICE}|AUTO|(AUTO|HETERO|MULTI):{_DEVICE}(,{_DEVICE})*"),
        "precision": ("FP32", "FP16", "ACCURACY"),
        "num_of_threads": range(1, 1025),
        "num_streams": range(1, 257),
        "model_priority": ("LOW", "MEDIUM", "HIGH", "DEFAULT"),
        "disable_dynamic_shapes": _TRUTH,
        "enable_opencl_throttling": _TRUTH,
        "enable_qdq_optimizer": _TRUTH,
    },
    "webgpu": {
        "deviceId": _DEVICE_ID,
        "preferredLayout": ("NCHW", "NHWC"),
        "powerPreference": ("high-performance", "low-power"),
        "dawnBackendType": ("Vulkan", "D3D12"),
        "enableGraphCapture": _SWITCH,
        "enableInt64": _SWITCH,
        "validationMode": ("disabled", "wgpuOnly", "basic", "full"),
        "storageBufferCacheMode": _BUFFER_CACHE,
        "uniformBufferCacheMode": _BUFFER_CACHE,
        "queryResolveBufferCacheMode": _BUFFER_CACHE,
        "defaultBufferCacheMode": _BUFFER_CACHE,
    },
    "qnn": {
        "backend_type": ("htp", "gpu", "cpu"),
        "htp_arch": HTP_ARCHS,
        "soc_model": range(10_000),
        "device_id": _DEVICE_ID,
        "vtcm_mb": range(1, 1025),
        "rpc_control_latency": range(1_000_000),
        "htp_performance_mode": (
            "burst", "balanced", "default", "high_performance", "high_power_saver", "low_balanced",
            "low_power_saver", "power_saver", "extreme_power_saver", "sustained_high_performance",
        ),
        "htp_graph_finalization_optimization_mode": ("0", "1", "2", "3"),
        "qnn_context_priority": ("low", "normal", "normal_high", "high"),
        "enable_htp_fp16_precision": _SWITCH,
        "enable_htp_weight_sharing": _SWITCH,
        "enable_htp_spill_fill_buffer": _SWITCH,
        "offload_graph_io_quantization": _SWITCH,
    },
    "coreml": {
        "ModelFormat": ("MLProgram", "NeuralNetwork"),
        "MLComputeUnits": ("ALL", "CPUOnly", "CPUAndGPU", "CPUAndNeuralEngine"),
        "RequireStaticInputShapes": _SWITCH,
        "EnableOnSubgraphs": _SWITCH,
        "SpecializationStrategy": ("Default", "FastPrediction"),
        "AllowLowPrecisionAccumulationOnGPU": _SWITCH,
    },
}  # fmt: skip


def in_manifest(provider: str, options: Mapping[str, str]) -> dict[str, str]:
    """Returns the `options` that a manifest may set for a provider, given by its short name."""
    return {name: value for name, value in options.items() if _may_set(provider, name, value)}


def not_kept(provider: str, options: Mapping[str, str]) -> str:
    """Returns a sentence that names the `options` that a manifest may not set; "" if there are none."""
    kept = in_manifest(provider, options)
    left = ", ".join(name for name in options if name not in kept)
    return left and (
        f"the bundle does not keep the provider options {left}, which no bundle may set: give them with "
        "--provider-option wherever it runs"
    )


def require_in_manifest(provider: str, options: Mapping[str, str], where: object) -> None:
    """Raises IntegrityError for an option in the manifest at `where` that a manifest may not set."""
    for name, value in options.items():
        if not _may_set(provider, name, value):
            raise IntegrityError(
                f"{where} sets {shown(name)} to {shown(value)} for the execution provider {shown(provider)}, and a "
                "bundle may not, since such options can load code or write files: export the model again if the bundle "
                "is yours, and do not use it otherwise"
            )


def _may_set(provider: str, name: str, value: str) -> bool:
    values = OPTIONS.get(provider, {}).get(name, ())
    if isinstance(values, range):
        return re.fullmatch("[0-9]{1,19}", value) is not None and int(value) in values
    if isinstance(values, re.Pattern):
        return values.fullmatch(value) is not None
    return value in values
