"""Ranks that read different architectures, each on its machine, are refused before they meet."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch.distributed as dist

from sps2_mega.checkpoint.given_config import given_config
from sps2_mega.config import ParallelConfig
from sps2_mega.errors import ConfigError
from sps2_mega.mcore.init import agree_topology
from sps2_mega.parallel.launcher import from_environment


@pytest.mark.parametrize("changes", [{}, {"norm_eps": 1e-6}])
def test_a_model_that_differs_is_named(changes) -> None:
    model = given_config("sps2-tiny")
    info = dataclasses.replace(from_environment({}), world_size=2)
    other = {
        "node": "n#0",
        "degrees": "tp=1 sp=2 sp_levels=None",
        "model": dataclasses.asdict(dataclasses.replace(model, **changes)),
        "problem": None,
    }
    store = dist.HashStore()
    store.set("sps2/rank/1", json.dumps(other))
    store.set("sps2/read/1", "")
    if not changes:
        assert agree_topology(store, info, ParallelConfig(sp=2), model=model).sp == 2
        return
    with pytest.raises(ConfigError, match=r"rank 0 has norm_eps=1e-05, rank 1 has 1e-06"):
        agree_topology(store, info, ParallelConfig(sp=2), model=model)
