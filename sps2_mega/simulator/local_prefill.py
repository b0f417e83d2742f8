"""How whole prompts are dealt to SP ranks that work side by side.

The most expensive first, each to the rank with least to
do. Decides that, not whether it pays (`step_cost`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from sps2_mega.simulator.compute import attention_s, causal_pairs, gemm_s
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.model_size import ModelSize
from sps2_mega.simulator.sparse_cost import Prompt


def dealt(
    prompts: Sequence[Prompt], *, tp: int, sp: int, size: ModelSize, hardware: Hardware
) -> tuple[int, float]:
    """Tokens of the rank with most of them, and one layer's seconds of attention on the rank with
    most of that, which need not be the same rank: both at once is the worst case. The prompts are
    new as a whole."""
    heads = size.num_heads / tp
    ranks = [(0.0, rank, 0.0, 0) for rank in range(sp)]
    for prompt in sorted(prompts, key=lambda p: -p.end):
        _, rank, attending_s, tokens = ranks[0]
        pairs = heads * causal_pairs(0, prompt.end)
        attending_s += attention_s(pairs, size.head_dim, 0.0, hardware)
        tokens += prompt.end
        linear_s = gemm_s(tokens, size.layer_params / tp, 0.0, hardware)
        heapq.heapreplace(ranks, (attending_s + linear_s, rank, attending_s, tokens))
    return max(tokens for *_, tokens in ranks), max(seconds for _, _, seconds, _ in ranks)
