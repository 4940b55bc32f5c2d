"""The device of a process: which one, its number type, whether its layers are compiled, and its peak speed."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from pastkey.contract.config import ModelConfig
from pastkey.errors import InputError

from ..settings import TrainConfig

# Peak of dense bfloat16 matrix products, in 10^12 operations per second, by data sheets. The first match counts.
_PEAK_TFLOPS: Final = (
    (r"\bB200\b", 2250.0),
    (r"\bH200\b", 989.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100\b", 989.0),
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX 4090\b", 165.0),
    (r"\bRTX 3090\b", 71.0),
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Device:
    """Where a process computes, and how."""

    torch_device: torch.device
    bfloat16: bool  # matrix products in bfloat16 by autocast; weights and their sums stay in float32
    compiled: bool  # each layer by torch.compile
    peak_flops: float | None  # per second; None if unknown

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def rows(self) -> int | None:
        """The most rows of a forward pass; None: all of a batch.

        On a CPU, parts of rows of about one length need less padding: a step of 24 stories lasted 0.8 of the time.
        """
        return 8 if self.torch_device.type == "cpu" else None

    def __str__(self) -> str:
        kind = self.torch_device.type
        name = f"cuda ({torch.cuda.get_device_name(self.torch_device)})" if self.is_cuda else kind
        numbers = "bfloat16 autocast" if self.bfloat16 else "float32"
        return f"{name}, {numbers}" + (", compiled" if self.compiled else "")

    def autocast(self) -> torch.autocast:
        """Returns the context of forward passes."""
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.bfloat16)

    def put(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of the CPU on this device. A copy to a GPU overlaps with its computations."""
        if self.is_cuda:
            return tensor.pin_memory().to(self.torch_device, non_blocking=True)
        return tensor.to(self.torch_device)

    def compile(self, model: nn.Module) -> None:
        """Compiles the layers of a model in place: all have one code, which is compiled once."""
        if self.compiled:
            for layer in layers_of(model):
                layer.compile()

    def eager(self) -> contextlib.AbstractContextManager[object]:
        """Returns the context of forward passes of other shapes than training's: they would be compiled once more."""
        # Importing this part of torch needs a second.
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    @contextlib.contextmanager
    def computing(self, threads: int | None) -> Iterator[None]:
        """Sets the threads and, on the CPU, deterministic algorithms; restores both afterwards.

        On a GPU, attention has no deterministic gradient that is as fast.
        """
        before, threads_before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
        products, filled = torch.get_float32_matmul_precision(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(self.torch_device.type == "cpu")
        # No computation of a decoder reads it, and it needs 5 % of a step.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.is_cuda:
            torch.set_float32_matmul_precision("high")
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            torch.set_float32_matmul_precision(products)
            torch.set_num_threads(threads_before)


def keep_freed_memory() -> None:
    """Lets this process keep the memory that a step frees, for the next. Getting it again needs 7 % of a step.

    Each 4 KB of new memory costs a page fault. Other C libraries than glibc are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that it accepts
        glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_device(config: TrainConfig, local_rank: int) -> Device:
    """Returns the device of the process that is number `local_rank` on its machine. Raises InputError if there is none.

    "auto" is CUDA if there is a card, or else the CPU. Apple's GPU ("mps") must be asked for.
    """
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        cards = torch.cuda.device_count()
        if cards == 0:
            raise InputError("--device is cuda, and torch sees no CUDA device: use --device cpu, or repair the driver")
        if local_rank >= cards:
            raise InputError(
                f"process {local_rank} of this machine has no card for itself, there are {cards}: "
                f"start at most {cards} processes per machine"
            )
        torch.cuda.set_device(local_rank)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device is mps, and torch sees no Apple GPU: use --device cpu")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    # On a CPU, float32 gives the same bits with and without a matrix unit.
    able = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bfloat16 = able if config.precision == "auto" else config.precision == "bfloat16"
    compiled = kind == "cuda" if config.compile is None else config.compile
    peak = None if config.peak_tflops is None else 1e12 * config.peak_tflops
    if peak is None and kind == "cuda" and bfloat16:
        peak = peak_flops(torch.cuda.get_device_name(device))
    return Device(device, bfloat16, compiled, peak)


def peak_flops(name: str) -> float | None:
    """Returns the peak of dense bfloat16 products of a card, per second; None if the table has no such card."""
    return next((1e12 * tflops for pattern, tflops in _PEAK_TFLOPS if re.search(pattern, name)), None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a decoder: its longest nn.ModuleList. The whole model if there is none."""
    lists = [[*module] for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[model])


def flops_per_token(model: nn.Module, config: ModelConfig | None) -> int:
    """Returns the floating-point operations of a training step per token: forward, and twice that backward.

    6 per weight of a matrix product, and 12 · L · H · D · T for attention, which counts masked pairs as well. As
    Chowdhery et al. 2022 (PaLM), appendix B, https://arxiv.org/abs/2204.02311. Without a configuration, attention is
    left out.
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if config is None:
        return int(6 * weights)
    row = config.num_attention_heads * config.head_dim * config.max_position_embeddings
    return int(6 * weights + 12 * config.num_hidden_layers * row)
