"""Random weights, for measuring a machine with a model whose checkpoint is not on it.

Values are made on the parameters' device, so a large model starts within seconds.
The model's text is noise; its speed and memory equal a real model's (zeros would
not do: matrix units run faster on them).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sps2_mega.checkpoint.canonical import canonical_shapes
from sps2_mega.checkpoint.sharding import local_shapes
from sps2_mega.config import ModelConfig

# As models are commonly initialised: activations neither vanish nor overflow in 16 bits.
_SPREAD = 0.02


@torch.no_grad()
def fill_random(
    parameters: Mapping[str, Tensor], config: ModelConfig, *, tp_rank: int, tp: int
) -> None:
    """Fill `parameters` (canonical names, this TP rank's shapes, any dtype and device).

    Norms are 1, biases 0, the rest normally distributed. Tensors that every TP rank
    holds whole are the same on all of them.

    Raises:
        ConfigError: `config` cannot be cut into `tp` ranks.
    """
    whole, local = canonical_shapes(config), local_shapes(config, tp)
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        seed = zlib.crc32(name.encode())
        if local[name] != whole[name]:
            seed += 1 + tp_rank
        generator = torch.Generator(parameter.device).manual_seed(seed)
        parameter.normal_(0.0, _SPREAD, generator=generator)
