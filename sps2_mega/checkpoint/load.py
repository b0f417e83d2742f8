"""Load of a source's weights into the parameters of one TP rank, one tensor after the other.

Peak memory above the parameters is at most one canonical tensor. Names and shapes are compared
first, so a wrong checkpoint fails before any data is read. `sharding` decides a rank's slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import canonical_shapes
from sps2_mega.checkpoint.inventory import check_complete, raise_if_any
from sps2_mega.checkpoint.sharding import local_shapes, rank_part
from sps2_mega.checkpoint.weight_source import WeightSource
from sps2_mega.config import ModelConfig


@torch.no_grad()
def load_weights(
    parameters: Mapping[str, Tensor],
    source: WeightSource,
    config: ModelConfig,
    *,
    tp_rank: int,
    tp: int,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `parameters` (canonical names, this TP rank's shapes, any dtype and device).

    `on_bytes(done, total)` is called after each tensor with bytes of the checkpoint read so far.

    Raises:
        CheckpointError: the source or the parameters do not fit `config`; lists every name
            concerned.
        ConfigError: `config` cannot be cut into `tp` ranks.
    """
    check_complete(source, config)
    _check_parameters(parameters, local_shapes(config, tp))
    sizes = {name: prod(shape) for name, shape in canonical_shapes(config).items()}
    item = getattr(torch, source.dtype).itemsize
    done, total = 0, sum(sizes.values()) * item
    for name, size in sizes.items():
        part = rank_part(name, config, tp_rank=tp_rank, tp=tp)
        source.read_into(parameters[name], name, part)
        done += size * item
        if on_bytes is not None:
            on_bytes(done, total)


def _check_parameters(
    parameters: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    problems = {
        "parameters that the model lacks": [name for name in expected if name not in parameters],
        "parameters without weights": [name for name in parameters if name not in expected],
        "parameters of another shape": [
            f"{name}: weights {list(shape)}, parameter {list(parameters[name].shape)}"
            for name, shape in expected.items()
            if name in parameters and tuple(parameters[name].shape) != shape
        ],
        "parameters on the meta device": [name for name, p in parameters.items() if p.is_meta],
    }
    raise_if_any(problems, "the configuration")
