"""Local prefill: whole prompts dealt to SP ranks, the most expensive first.

Each goes to the rank with the least to do so far. Whether that pays, `step_cost` decides.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sps2_mega.simulator.compute import attention_s, gemm_s
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.model_size import ModelSize
from sps2_mega.simulator.prompt import Prompt


def dealt(
    prompts: Sequence[Prompt], *, tp: int, sp: int, size: ModelSize, hardware: Hardware
) -> tuple[int, float]:
    """Most tokens of any rank, and most seconds of attention of any rank in one layer.

    They need not be the same rank: both at once is the worst case. Nothing of the prompts is
    cached.
    """
    heads = size.num_heads / tp
    ranks = [(0.0, rank, 0.0, 0) for rank in range(sp)]
    for prompt in sorted(prompts, key=lambda p: -p.end):
        _, rank, attending_s, tokens = ranks[0]
        pairs = heads * prompt.pairs
        attending_s += attention_s(pairs, size.head_dim, 0.0, hardware)
        tokens += prompt.end
        linear_s = gemm_s(tokens, size.layer_params / tp, 0.0, hardware)
        heapq.heapreplace(ranks, (attending_s + linear_s, rank, attending_s, tokens))
    return max(tokens for *_, tokens in ranks), max(seconds for _, _, seconds, _ in ranks)
