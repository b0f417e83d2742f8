"""Local prefill: steps in which every prompt lies whole on one SP rank, and a rank's part."""

from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.local_prefill import local_part


def layout(block_ranks, ends, starts=None, sp_size=3):
    return build_layout(block_ranks, ends, starts=starts, block_size=4, sp_size=sp_size)


def test_a_rank_gets_the_layout_of_its_own_prompts():
    step = layout([[2, 2], [0], [2, 2, 2]], [7, 3, 12])
    part = local_part(step, 2)
    assert part.sequences == (0, 2)
    assert part.layout == layout([[0, 0], [0, 0, 0]], [7, 12], sp_size=1)
    assert local_part(step, 0).layout == layout([[0]], [3], sp_size=1)
    assert local_part(step, 1).sequences == ()


def test_cached_tokens_count_too():
    spread = layout([[0, 1, 1], [2]], [9, 1], starts=[4, 0])
    assert all(local_part(spread, rank) is None for rank in range(3))
    step = layout([[1, 1, 1], [1]], [9, 1], starts=[4, 0])
    part = local_part(step, 1)
    assert part.layout == layout([[0, 0, 0], [0]], [9, 1], starts=[4, 0], sp_size=1)
    assert part.layout.queries is not part.layout.keys
