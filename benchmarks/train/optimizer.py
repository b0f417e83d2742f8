"""Muon for the layers' matrices, AdamW for the rest, and the learning rates over a run."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.train.config import OptimizerConfig


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon, then AdamW, which updates embeddings: their rows change one by one, not as a matrix."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices,
            lr=config.muon_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        ),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the full rate at `step`: linear warm-up, constant, linear decay to `final_lr`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    begin = config.decay_from * num_steps
    if step < begin:
        return warm
    done = (step - begin) / max(1.0, num_steps - 1 - begin)
    return warm * (1 - (1 - config.final_lr) * min(1.0, done))


def set_rates(
    optimizers: list[torch.optim.Optimizer], factor: float, config: OptimizerConfig
) -> None:
    for optimizer, rate in zip(optimizers, (config.muon_lr, config.adam_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
