"""The optimizer, its learning rates, and its state as a checkpoint keeps it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from pastkey.errors import IntegrityError

from .settings import TrainConfig

_BETAS: Final = (0.9, 0.95)  # of AdamW; a shorter second moment than the default suits short runs
_FINAL_RATE: Final = 0.05  # the cosine's final learning rate, as a share of the peak
_MUON_RATE: Final = 4.0  # times AdamW's
_MOMENTUM: Final = 0.9  # of Muon
_NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: steep at 0, so that five iterations suffice
_ITERATIONS: Final = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, Jordan 2024, https://kellerjordan.github.io/posts/muon.

    torch's own computes in bfloat16, which needs seconds a step on a processor without it; this one computes in the
    type of the gradients, all matrices of a shape at once.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Runs a step with the gradients of the matrices."""
        assert closure is None
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for group in self.param_groups:
            for matrix in group["params"]:
                by_shape[matrix.shape].append(matrix)
        rate = self.param_groups[0]["lr"]
        for shape, matrices in by_shape.items():
            updates = []
            for matrix in matrices:
                assert matrix.grad is not None
                if not self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                momentum = self.state[matrix]["momentum"]
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                updates.append(matrix.grad.lerp(momentum, _MOMENTUM))  # Nesterov's
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                matrix.add_(update, alpha=-rate * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Returns about U Vᵀ of the singular value decomposition U S Vᵀ of each of the matrices (N, rows, columns)."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def schedule(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down, Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983.

    Returns the share of the peak at which the optimizers make this step, counted from 0.
    """
    warmup = min(config.warmup_steps, config.steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Returns AdamW, and Muon for the matrices of projections if configured. A group's "peak" is its rate.

    AdamW decays the weights of projections only, not norms, biases and embeddings: an embedding's row grows only when
    its token occurs, and decay at every step would shrink the rare ones away.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for name, parameter in named.items() if name.endswith("proj.weight")]
    others = [parameter for name, parameter in named.items() if not name.endswith("proj.weight")]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}]
    if config.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    fused = all(parameter.is_cuda for parameter in named.values()) or None
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=fused)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if config.optimizer == "muon":
        optimizers.append(Muon(matrices, lr=_MUON_RATE * config.learning_rate))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def moments_of(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Returns the optimizers' moments, each as `parameter.moment`, for a resumed run."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{moment}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for moment, tensor in state.items()
        if moment != "step"
    }


def restore_moments(
    optimizers: Iterable[torch.optim.Optimizer], model: nn.Module, moments: Mapping[str, Tensor], step: int
) -> None:
    """Gives the optimizers the moments that `moments_of` returned after `step` steps.

    Raises IntegrityError for a moment that is missing or of another shape: of another model or optimizer.
    """
    if step == 0:
        return
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ):
            state[number] = {}
            for moment in moment_names(optimizer):
                found = moments.get(name := f"{names[parameter]}.{moment}")
                if found is None or found.shape != parameter.shape:
                    raise IntegrityError(
                        f"the checkpoint's optimizer has no {name} of shape {tuple(parameter.shape)}: it is another "
                        "model's, or was altered; copy the checkpoint again"
                    )
                state[number][moment] = found
            if not isinstance(optimizer, Muon):
                state[number]["step"] = torch.tensor(float(step))
        # which puts each tensor on its parameter's device
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Returns the tensors that the optimizer keeps of each parameter."""
    return ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
