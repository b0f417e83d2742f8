"""Slots that decode reads under CSA, on each rank, as a sequence grows, against the definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.config import CSAConfig
from sps2_mega.worker.local_tables import LocalTables
from sps2_mega.worker.sparse_tables import SparseTables

SP = 3


def check(*, degrees, spans, sinks, halo, block_size, prompt_len, new_tokens, kv_heads, seed=0):
    """Grow a sequence on all ranks and compare every head, layer and token with `pattern.sees`."""
    csa = CSAConfig(
        degrees=degrees, spans=spans, sinks=sinks, halo=halo, tail=7, sample_queries=True
    )
    sparse = SparsePrefill(csa=csa, sp_levels=(SP,), kv_heads=kv_heads, block_size=block_size)
    generator = np.random.default_rng(seed)
    num_blocks = -(-(prompt_len + new_tokens) // block_size)
    ranks = generator.integers(0, SP, num_blocks).tolist()
    ids = generator.permutation(num_blocks + 5)[:num_blocks].tolist()
    known = -(-prompt_len // block_size)
    held = []
    for rank in range(SP):
        tables = LocalTables(rank=rank, block_size=block_size)
        tables.add(7, ranks[:known], ids[:known], prompt_len)
        sparse_tables = SparseTables(tables, sparse, block_size=block_size)
        sparse_tables.add(7, sparse.pattern(prompt_len))
        held.append((tables, sparse_tables))
    pattern = sparse.pattern(prompt_len)
    decode = type(pattern)(
        degrees=pattern.degrees,
        spans=pattern.spans,
        sinks=sinks,
        halo=halo,
        tail=0,
        sample_queries=False,
    )
    for position in range(prompt_len, prompt_len + new_tokens):
        index, layers = position // block_size, (0, 1, 5)
        found = {(layer, head): [] for layer in layers for head in range(len(kv_heads))}
        for rank, (tables, sparse_tables) in enumerate(held):
            if position % block_size == 0:
                tables.add_block(7, ranks[index], ids[index], index)
            if ranks[index] == rank:
                tables.append_token(7, position)
            step = sparse_tables.step([7], [position])
            position_of = {
                (ids[b], offset): b * block_size + offset
                for b in range(index + 1)
                if ranks[b] == rank
                for offset in range(block_size)
            }
            for layer in layers:
                for head, slots in enumerate(step.layer_slots(layer % step.num_classes)[0]):
                    found[layer, head] += [
                        position_of[divmod(s, block_size)] for s in slots.tolist()
                    ]
        for (layer, head), keys in found.items():
            expected = [
                j
                for j in range(position + 1)
                if decode.sees(
                    position, j, kv_head=kv_heads[head], layer=layer, prompt_len=position + 1
                )
            ]
            assert sorted(keys) == expected, (position, layer, head)


def test_far_keys_are_strided_per_head_and_layer():
    check(
        degrees=(1, 3),
        spans=(16,),
        sinks=2,
        halo=3,
        block_size=4,
        prompt_len=45,
        new_tokens=40,
        kv_heads=range(2, 6),
    )


def test_one_token_and_topology_spans():
    for prompt_len in (1, 2, 13):
        check(
            degrees=(2, 4),
            spans=None,
            sinks=0,
            halo=0,
            block_size=4,
            prompt_len=prompt_len,
            new_tokens=15,
            kv_heads=range(1, 2),
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20)), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(0, 9),
    st.integers(1, 7),
    st.integers(1, 50),
    st.integers(0, 100),
)
def test_any_pattern(levels, sinks, halo, block_size, prompt_len, seed):
    spans = tuple(sorted(span for _, span in levels[1:]))
    check(
        degrees=tuple(degree for degree, _ in levels),
        spans=spans,
        sinks=sinks,
        halo=halo,
        block_size=block_size,
        prompt_len=prompt_len,
        new_tokens=9,
        kv_heads=range(3, 5),
        seed=seed,
    )
