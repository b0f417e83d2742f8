"""Random weights: every parameter gets values, equal on all TP ranks that hold it whole."""

from __future__ import annotations

import pytest
import torch
from unit.checkpoint.checkpoints import CONFIGS

from sps2_mega.checkpoint.canonical import canonical_shapes
from sps2_mega.checkpoint.random_weights import fill_random
from sps2_mega.checkpoint.sharding import local_shapes


def filled(config, tp: int, tp_rank: int) -> dict[str, torch.Tensor]:
    parameters = {
        name: torch.full(shape, torch.nan, dtype=torch.bfloat16)
        for name, shape in local_shapes(config, tp).items()
    }
    fill_random(parameters, config, tp_rank=tp_rank, tp=tp)
    return parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_finite_and_differ_between_ranks_only_where_tensors_are_cut(name: str) -> None:
    config = CONFIGS[name]
    whole, local = canonical_shapes(config), local_shapes(config, 2)
    first, second = filled(config, 2, 0), filled(config, 2, 1)
    for key, values in first.items():
        assert values.isfinite().all()
        if values.dim() == 1:
            assert (values == (0.0 if key.endswith("bias") else 1.0)).all()
        else:
            assert values.unique().numel() > 1
            assert torch.equal(values, second[key]) == (local[key] == whole[key])


def test_the_same_again_at_the_next_start() -> None:
    config = CONFIGS["llama"] if "llama" in CONFIGS else next(iter(CONFIGS.values()))
    first, second = filled(config, 1, 0), filled(config, 1, 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
