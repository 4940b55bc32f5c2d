"""The table of onnxruntime's execution providers: one row holds all that the stages know about a provider.

A new provider is a new row. `export --target` offers the rows with `target`, and "portable".
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

# The valid values of an option: fixed words, a range of whole numbers, or a pattern.
Values = tuple[str, ...] | range | re.Pattern[str]


class Seen(enum.Enum):
    """How much of a graph ran on a provider in our tests."""

    WHOLE = enum.auto()  # no node fell back to the CPU
    RUNS = enum.auto()  # at most a few nodes fell back
    PARTLY = enum.auto()  # attention fell back to the CPU


class Form(enum.Enum):
    """Which operators read quantized weights (`export/quantize/rounding/rewrite.py`)."""

    MATMUL_NBITS = enum.auto()  # rules 1 to 5
    GPU = enum.auto()  # MatMulNBits and GatherBlockQuantized, which WebGPU supports fully; rule 5 is not needed
    DEQUANTIZE_LINEAR = enum.auto()  # ONNX's own, `block_dequantize`


def short_name(name: str) -> str:
    """The name a user types: "CUDAExecutionProvider" -> "cuda"."""
    return name.removesuffix("ExecutionProvider").lower()


@dataclass(frozen=True)
class Provider:
    """One execution provider, installed or not."""

    name: str  # in onnxruntime
    hardware: str = ""
    source: str = ""  # how to install it
    graphs: Mapping[str, Seen] = field(default_factory=dict)  # graph -> how it ran in our tests
    remedy: str = ""  # advice if the fused graph does not suit it
    plugin: str = ""  # the module to register with onnxruntime
    options: Mapping[str, str] = field(default_factory=dict)  # the defaults
    values: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # option -> valid values, of options that are checked
    # Options that a bundle may set: `contract/provider_options.py`.
    manifest_options: Mapping[str, Values] = field(default_factory=dict)
    # KV cache:
    device: str = "cpu"  # onnxruntime's name of the memory that holds the cache
    allocates: bool = True  # whether onnxruntime's Python API can allocate there; otherwise a run places the cache
    fixed_shapes: bool = False  # compiles the graph again for each new shape, and past changes with every token
    # Operators:
    ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # operator -> attributes without effect
    misses_keys: bool = False  # GroupQueryAttention omits keys in a prefill and in a padded batch
    # Export:
    target: bool = False  # whether --target offers it; its bundles run there by default
    form: Form = Form.MATMUL_NBITS
    why_standard: str = "the fused graph is not known to run there"  # why its bundles have the standard graph
    block_sums: bool = False  # multiplies by blocks with offsets: `--precision source` of Q4_K, Q5_K, Q4_1, Q5_1
    loop: bool = False  # runs the Loop operator of `--generate`
    ort_format: bool = False  # can load the ORT format, which is optimised for a CPU
    states: bool = False  # the operators that keep states were run on it
    npu: bool = False  # runs static graphs only, and computes in float16
    static_int8: bool = False  # runs static graphs with QuantizeLinear and DequantizeLinear
    reads_tables: bool = True  # gathers rows of tables; otherwise the host feeds the rows

    @property
    def short(self) -> str:
        """The name a user types."""
        return short_name(self.name)

    @property
    def whole(self) -> frozenset[str]:
        """The graphs without CPU fallback."""
        return frozenset(graph for graph, seen in self.graphs.items() if seen == Seen.WHOLE)

    @property
    def takes_fused(self) -> bool:
        """Whether its bundles may have the fused graph."""
        return self.graphs.get("fused") in (Seen.WHOLE, Seen.RUNS)


_RUNS = {"fused": Seen.RUNS}
_SOURCE_BUILD = "onnxruntime built from source with"
_SWITCH = ("0", "1")
_TRUTH = ("true", "false", "True", "False")
_DEVICE_ID = range(256)
_BYTES = range(1, 2**63)
_BUFFER_CACHE = ("disabled", "lazyRelease", "simple", "bucket")
_DEVICE = "(CPU|GPU|NPU)([.][0-9]{1,2})?"  # of OpenVINO
_HTP_ARCHS = ("69", "73", "75", "79", "81")  # 68 lacks float16; QNN treats an unknown one as 68

_ROWS = (
    Provider(
        "CPUExecutionProvider", "any CPU", "pip install onnxruntime", _RUNS, target=True, loop=True, ort_format=True,
        states=True, block_sums=True,
    ),
    Provider(
        "CUDAExecutionProvider", "NVIDIA GPUs", "pip install onnxruntime-gpu, with CUDA and cuDNN", _RUNS,
        device="cuda", target=True, loop=True,
        manifest_options={
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
    ),
    Provider(
        "TensorrtExecutionProvider", "NVIDIA GPUs", "pip install onnxruntime-gpu, with TensorRT", _RUNS, device="cuda",
    ),
    Provider(
        "OpenVINOExecutionProvider", "Intel CPUs, GPUs, NPUs", "pip install onnxruntime-openvino",
        {"standard": Seen.WHOLE, "static": Seen.WHOLE, "fused": Seen.PARTLY},
        remedy="export the model again with --target openvino",
        fixed_shapes=True, target=True,
        manifest_options={
            "device_type": re.compile(f"{_DEVICE}|AUTO|(AUTO|HETERO|MULTI):{_DEVICE}(,{_DEVICE})*"),
            "precision": ("FP32", "FP16", "ACCURACY"),
            "num_of_threads": range(1, 1025),
            "num_streams": range(1, 257),
            "model_priority": ("LOW", "MEDIUM", "HIGH", "DEFAULT"),
            "disable_dynamic_shapes": _TRUTH,
            "enable_opencl_throttling": _TRUTH,
            "enable_qdq_optimizer": _TRUTH,
        },
    ),
    Provider(
        "WebGpuExecutionProvider", "GPUs by Vulkan, Metal or D3D12", "pip install onnxruntime-webgpu",
        {"fused": Seen.RUNS, "static": Seen.WHOLE, "standard": Seen.RUNS},
        remedy="export the model again with --target webgpu",
        device="webgpu", allocates=False, ignores={"GroupQueryAttention": ("softcap",)}, misses_keys=True,
        target=True, form=Form.GPU,
        manifest_options={
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
    ),
    Provider(
        "QNNExecutionProvider", "Qualcomm NPUs", "pip install onnxruntime onnxruntime-qnn", {"static": Seen.WHOLE},
        remedy="export the model again with --target qnn",
        plugin="onnxruntime_qnn",
        # The compiler defaults to 68, which lacks float16: every decoder then fails (1002).
        options={"backend_type": "htp", "htp_arch": "75", "soc_model": "57"},
        values={"htp_arch": _HTP_ARCHS},
        target=True, npu=True, static_int8=True,
        manifest_options={
            "backend_type": ("htp", "gpu", "cpu"),
            "htp_arch": _HTP_ARCHS,
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
    ),
    Provider(
        "CoreMLExecutionProvider", "Apple GPUs and neural engines", "pip install onnxruntime on macOS",
        remedy="export the model again with --target coreml --precision fp32",
        options={"ModelFormat": "MLProgram"},
        target=True, npu=True, reads_tables=False,
        manifest_options={
            "ModelFormat": ("MLProgram", "NeuralNetwork"),
            "MLComputeUnits": ("ALL", "CPUOnly", "CPUAndGPU", "CPUAndNeuralEngine"),
            "RequireStaticInputShapes": _SWITCH,
            "EnableOnSubgraphs": _SWITCH,
            "SpecializationStrategy": ("Default", "FastPrediction"),
            "AllowLowPrecisionAccumulationOnGPU": _SWITCH,
        },
    ),
    Provider("DmlExecutionProvider", "GPUs under Windows", "pip install onnxruntime-directml on Windows"),
    Provider("MIGraphXExecutionProvider", "AMD GPUs", "pip install onnxruntime-migraphx, with ROCm"),
    Provider("ROCMExecutionProvider", "AMD GPUs, of older releases", f"{_SOURCE_BUILD} --use_rocm"),
    Provider("XnnpackExecutionProvider", "ARM CPUs", f"{_SOURCE_BUILD} --use_xnnpack"),
    Provider("NnapiExecutionProvider", "Android accelerators", "onnxruntime for Android"),
    Provider("CANNExecutionProvider", "Huawei Ascend NPUs", "pip install onnxruntime-cann"),
)  # fmt: skip
PROVIDERS: Final = {row.short: row for row in _ROWS}  # by short name

# By the words of `--target`. A portable bundle has ONNX-standard operators only, for providers without a row. Its
# default provider is the CPU.
TARGETS: Final = {row.short: row for row in _ROWS if row.target} | {
    "portable": replace(
        PROVIDERS["cpu"],
        graphs={"standard": Seen.RUNS},
        states=False,
        block_sums=False,
        form=Form.DEQUANTIZE_LINEAR,
        why_standard="standard operators only",
    )
}
