"""The optimizer and its learning rate, and its state as a checkpoint keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from .model import Decoder
from .settings import TrainConfig

_BETAS: Final = (0.9, 0.95)  # of AdamW; a shorter second moment than the default suits short runs
_FINAL_RATE: Final = 0.05  # the cosine's final learning rate, as a share of the peak


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down, Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (_FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    """Returns AdamW with decay on the weights of projections only, not on norms, biases and embeddings.

    An embedding's row grows only when its token occurs; decay at every step would shrink the rare ones away.
    """
    decayed, free = _parameter_groups(model)
    return torch.optim.AdamW(
        [
            {"params": list(decayed.values()), "weight_decay": config.weight_decay},
            {"params": list(free.values()), "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=_BETAS,
    )


def _parameter_groups(model: Decoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    decayed: dict[str, Tensor] = {}
    free: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # of the base, with LoRA
            continue
        (decayed if name.endswith("proj.weight") else free)[name] = parameter
    return decayed, free


def _parameter_names(model: Decoder) -> list[str]:
    """Returns the names in the order in which the optimizer numbers its parameters."""
    return [name for group in _parameter_groups(model) for name in group]


def moments_of(optimizer: torch.optim.AdamW, model: Decoder) -> dict[str, Tensor]:
    """Returns the optimizer's moments, each as `parameter.moment`: what a resumed run needs."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}.{moment}": state[number][moment]
        for number, name in enumerate(_parameter_names(model))
        for moment in ("exp_avg", "exp_avg_sq")
    }


def restore_moments(optimizer: torch.optim.AdamW, model: Decoder, moments: Mapping[str, Tensor], step: int) -> None:
    """Gives the optimizer the moments that `moments_of` returned after `step` steps."""
    if step == 0:
        return
    state = {
        number: {"step": torch.tensor(float(step))}
        | {moment: moments[f"{name}.{moment}"] for moment in ("exp_avg", "exp_avg_sq")}
        for number, name in enumerate(_parameter_names(model))
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
