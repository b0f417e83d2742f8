"""Tensors of the KV cache on one rank; the content of each block is decided elsewhere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class KVPool:
    """Keys and values of this rank's blocks.

    Per layer both are [num_blocks, block_size, local KV heads, head_dim].
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate zeroed keys and values.

        Args:
            num_layers: layers, each with keys and values of its own.
            num_blocks: blocks of this rank.
            block_size: tokens of a block.
            num_kv_heads: KV heads of this TP rank.
            head_dim: elements of a head.
            dtype: type of the elements.
            device: device of the tensors.
        """
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        # Invisible slots are masked, but masked NaN garbage times zero is NaN: hence zeros, which
        # cost no memory on CPU until a page is written.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(self._keys[i], self._values[i]) for i in range(num_layers)]
        self.block_size = block_size
        self.num_blocks = num_blocks

    @property
    def num_layers(self) -> int:
        return len(self._keys)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of one layer."""
        return self._layers[index]

    def clear(self, block_ids: np.ndarray) -> None:
        """Zero the given blocks in all layers."""
        index = torch.from_numpy(block_ids).to(self._keys.device)
        self._keys.index_fill_(1, index, 0)
        self._values.index_fill_(1, index, 0)

    @staticmethod
    def bytes_per_block(
        *, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
