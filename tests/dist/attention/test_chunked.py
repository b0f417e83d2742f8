"""Attention chunk by chunk equals the definition, wherever a prompt is cut.

No key travels twice in a layer.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from harness import free_port, run_ranks

from sps2_mega.attention.chunk_scores import ExactChunks, SparseChunks
from sps2_mega.attention.chunked import ChunkedPrefill
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.layout.chunk_layout import stretch
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PIPELINE_OFF, PipelineSettings
from sps2_mega.attention.step import StepAttention
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import SINGLE, Group

BLOCK_SIZE, HEADS, KV_HEADS, WIDTH, SCALE, LAYERS = 4, 6, 3, 8, 0.35, 2
FIRST_HEAD = 3  # of this TP rank, among all KV heads
PATTERNS: dict[str, dict | int | None] = {
    "exact": None,
    "window": 13,
    "two levels": dict(degrees=(1, 4), spans=(24,), sinks=3, halo=5, tail=7),
    "sampled": dict(degrees=(1, 2), spans=(20,), sinks=0, halo=0, tail=0, sample_queries=True),
    "strided own cell": dict(degrees=(2, 4), spans=(16,), sinks=2, halo=1, tail=5),
    "blocks": dict(degrees=(1, 2, 3), spans=(10, 37), sinks=2, halo=3, tail=4, block=4),
}
# (tokens, prompt tokens, cached before, cuts): the second is recomputed after a preemption, the
# third is one token.
PROMPTS = [
    (101, 101, 0, (16, 17, 60)),
    (103, 90, 24, (25, 31, 77, 102)),
    (41, 41, 40, ()),
]


def pattern_of(name: str) -> CSAPattern | None:
    given = PATTERNS[name]
    if not isinstance(given, dict):
        return None
    return CSAPattern(**(dict(sample_queries=False) | given))


def case(name: str, number: int, size: int):
    """(layout, q, k, v by layer, scores, softmax)"""
    generator = torch.Generator().manual_seed(number)
    tokens, prompt_len, cached, _ = PROMPTS[number]
    # The last rank of three has no token of the second prompt.
    ranks = torch.randint(
        0, min(size, 2) if number == 1 else size, (-(-tokens // BLOCK_SIZE),), generator=generator
    ).tolist()
    layout = build_layout([ranks], [tokens], starts=[cached], block_size=BLOCK_SIZE, sp_size=size)
    shape = LAYERS, tokens
    q = torch.randn(*shape, HEADS, WIDTH, generator=generator)
    k, v = (torch.randn(*shape, KV_HEADS, WIDTH, generator=generator) for _ in range(2))
    pattern = pattern_of(name)
    heads = range(FIRST_HEAD, FIRST_HEAD + KV_HEADS)
    scores = ExactChunks() if pattern is None else SparseChunks(pattern, prompt_len, heads)
    window = PATTERNS[name] if isinstance(PATTERNS[name], int) else None
    return layout, (q, k, v), scores, SoftmaxParams(SCALE, window)


def on_one_rank(name: str, number: int, settings: PipelineSettings, group: Group):
    """Positions and outputs [layers, T, N, H] of this rank's tokens, and bytes sent per layer."""
    layout, (q, k, v), scores, softmax = case(name, number, group.size)
    cuts = PROMPTS[number][3]

    def positions(tokens) -> torch.Tensor:
        found = [torch.arange(run.start, run.end) for run in tokens.local_runs(group.rank)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *found])

    keys, queries = positions(layout.keys), positions(layout.queries)
    cpu = torch.device("cpu")
    pool = KVPool(
        num_layers=LAYERS,
        num_blocks=len(keys) + 1,
        block_size=1,
        num_kv_heads=KV_HEADS,
        head_dim=WIDTH,
        dtype=torch.float32,
        device=cpu,
    )
    slots = torch.randperm(len(keys), generator=torch.Generator().manual_seed(5))
    cached = slots[: len(keys) - len(queries)]
    for layer in range(LAYERS):
        for cache, x in zip(pool.layer(layer), (k, v), strict=True):
            cache.flatten(0, 1)[cached] = x[layer][keys[: len(cached)]]
    chunks = ChunkedPrefill(
        pool,
        cached,
        layout,
        scores,
        group,
        Pipeline(make_comm_streams(cpu), settings=settings),
        whole_output=group.size < 3,
    )
    attention = StepAttention(pool, slots[len(cached) :], chunks)
    tokens, _, start, _ = PROMPTS[number]
    out = torch.full((LAYERS, len(queries), HEADS, WIDTH), torch.nan)
    sent = []
    for layer in range(LAYERS):
        before = group.traffic.bytes_sent
        for low, high in zip((start, *cuts), (*cuts, tokens), strict=True):
            rows = chunks.begin(low, high)
            attention.select_rows(rows, ends_layer=high == tokens)
            mine = queries[rows]
            new = (x[layer][mine] for x in (q, k, v))
            out[layer, rows] = attention.run_layer(layer, *new, softmax)
        sent.append(group.traffic.bytes_sent - before)
        for cache, x in zip(pool.layer(layer), (k, v), strict=True):
            assert torch.equal(cache.flatten(0, 1)[slots], x[layer][keys])
    return queries, out, sent


def on_rank(rank: int, port: int, settings: PipelineSettings):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=info.world_size))
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
    results = all_cases(settings, groups.sp)
    finalize()
    return results


def all_cases(settings: PipelineSettings, group: Group):
    return {
        (name, number): on_one_rank(name, number, settings, group)
        for name in PATTERNS
        for number in range(len(PROMPTS))
    }


def by_definition(name: str, number: int) -> torch.Tensor:
    """[layers, tokens, N, H] from masks made pair by pair."""
    tokens, prompt_len, _, _ = PROMPTS[number]
    _, (q, k, v), _, softmax = case(name, number, 1)
    pattern, repeats = pattern_of(name), HEADS // KV_HEADS
    out = torch.empty_like(q)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            mask = torch.tensor(
                [
                    [
                        (j <= i and (softmax.window is None or j > i - softmax.window))
                        if pattern is None
                        else pattern.sees(
                            i, j, kv_head=FIRST_HEAD + head, layer=layer, prompt_len=prompt_len
                        )
                        for j in range(tokens)
                    ]
                    for i in range(tokens)
                ]
            )
            for n in range(head * repeats, (head + 1) * repeats):
                scores = SCALE * q[layer, :, n] @ k[layer, :, head].t()
                scores = scores.masked_fill(~mask, -torch.inf).softmax(-1)
                # A query of a sampled pattern may see nothing.
                out[layer, :, n] = scores.nan_to_num() @ v[layer, :, head]
    return out


def keys_sent(number: int, size: int) -> int:
    """Rows that each rank sends per layer if every key crosses once.

    Keys are padded to the longest share of their chunk.
    """
    layout, *_ = case("exact", number, size)
    tokens, _, _, cuts = PROMPTS[number]
    chunks = itertools.pairwise([0, *cuts, tokens])
    return sum(max(stretch(layout.keys, *chunk).tokens.counts) for chunk in chunks)


@pytest.mark.parametrize(
    ("size", "settings"),
    [(1, PIPELINE_OFF), (2, PipelineSettings()), (3, PIPELINE_OFF)],
    ids=["1", "2", "3"],
)
def test_chunks_are_those_of_the_definition(size, settings):
    if size == 1:
        ranks = [all_cases(settings, SINGLE)]
    else:
        ranks = run_ranks(on_rank, size, free_port(), settings)
    row_bytes = 2 * KV_HEADS * WIDTH * 4
    for name, number in ranks[0]:
        expected = by_definition(name, number)
        seen = []
        for found in ranks:
            positions, out, sent = found[name, number]
            read = torch.ones_like(positions, dtype=torch.bool).expand(LAYERS, -1).clone()
            if size == 3:
                read[-1] = positions == PROMPTS[number][0] - 1
            torch.testing.assert_close(
                out[read], expected[:, positions][read], atol=2e-5, rtol=1e-4
            )
            seen += positions.tolist()
            if size == 2:
                assert sent == [row_bytes * keys_sent(number, size)] * LAYERS
        tokens, _, start, _ = PROMPTS[number]
        assert sorted(seen) == list(range(start, tokens))
