"""Prefill by exchanges on several ranks equals the pair-by-pair definition of CSA.

It sends only what is seen.
"""

from __future__ import annotations

import math
import os
from functools import cache

import pytest
import torch
from harness import free_port, run_ranks

from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.levels.exchanges import prefill_exchanges
from sps2_mega.attention.levels.transport import HierarchicalTransport
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PIPELINE_OFF, PipelineSettings
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.config import CSAConfig
from sps2_mega.parallel.groups import SINGLE, Group

BLOCK_SIZE, HEADS, WIDTH, SCALE, LAYERS = 4, 6, 8, 0.35, (0, 5)
PATTERNS = {
    "two levels": dict(degrees=(1, 4), spans=(24,), sinks=3, halo=5, tail=7),
    "paper": dict(degrees=(1, 2), spans=(20,), sinks=0, halo=0, tail=0, sample_queries=True),
    "three levels": dict(degrees=(1, 2, 3), spans=(8, 32), sinks=1, halo=2, tail=1),
    "strided own cell": dict(degrees=(2, 4), spans=(16,), sinks=2, halo=1, tail=5),
    "no far keys but the tail's": dict(degrees=(1, 1000), spans=(16,), sinks=0, halo=0, tail=20),
    "blocks": dict(degrees=(1, 2, 3), spans=(10, 37), sinks=2, halo=3, tail=4, block=4),
    "exact": dict(degrees=(1, 1), spans=(16,), sinks=0, halo=0, tail=0),
}
# (tokens, prompt tokens, tokens cached before): the second sequence is recomputed after a
# preemption, the third is all tail, and of the last two some is there already.
LENGTHS = [(101, 101, 0), (70, 61, 0), (3, 3, 0), (40, 40, 13), (66, 66, 64)]
CONTIGUOUS, SCATTERED = True, False


def case(name: str, levels: tuple[int, ...], transports=("gather",), in_order=CONTIGUOUS):
    csa = CSAConfig(**(dict(sample_queries=False) | PATTERNS[name]))
    sparse = SparsePrefill(
        csa=csa,
        sp_levels=levels,
        kv_heads=range(3, 6),
        block_size=BLOCK_SIZE,
        transports=transports,
    )
    generator = torch.Generator().manual_seed(1)
    sp = math.prod(levels)
    ends = [tokens for tokens, _, _ in LENGTHS]
    ranks = [
        torch.randint(0, sp, (-(-n // BLOCK_SIZE),), generator=generator).tolist() for n in ends
    ]
    layout = build_layout(
        [sorted(blocks) for blocks in ranks] if in_order else ranks,
        ends,
        starts=[start for _, _, start in LENGTHS],
        block_size=BLOCK_SIZE,
        sp_size=sp,
    )
    return sparse, layout, inputs(len(sparse.kv_heads))


@cache
def inputs(num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q, K and V of all tokens, [T, heads, WIDTH], the same for every case."""
    generator = torch.Generator().manual_seed(2)
    num_tokens = sum(tokens for tokens, _, _ in LENGTHS)
    q, k, v = (
        torch.randn(num_tokens, heads, WIDTH, generator=generator)
        for heads in (HEADS, num_kv_heads, num_kv_heads)
    )
    return q, k, v


def local_index(runs, counts, layout):
    """Number in sequence order, over all tokens, of each local token."""
    starts = layout.keys.seq_starts()
    index = torch.zeros(counts, dtype=torch.int64)
    for run in runs:
        index[run.local] = torch.arange(run.start, run.end) + starts[run.sequence]
    return index


def on_one_rank(case_of: tuple, group: Group):
    """Which queries this rank has, their outputs in two layers without and with pipeline, and the
    bytes sent."""
    sparse, layout, (q, k, v) = case(*case_of)
    me = group.rank
    queries = local_index(layout.queries.local_runs(me), layout.queries.counts[me], layout)
    keys = local_index(layout.keys.local_runs(me), layout.keys.counts[me], layout)
    prompt_lens = [prompt for _, prompt, _ in LENGTHS]
    cpu = torch.device("cpu")
    outs, sent = [], []
    for settings in (PIPELINE_OFF, PipelineSettings(mode="on", micro_batches=2)):
        transport = HierarchicalTransport(
            layout,
            [sparse.pattern(n) for n in prompt_lens],
            prompt_lens,
            sparse.transports,
            sparse.sp_levels,
            kv_heads=sparse.kv_heads,
            group=group,
            device=cpu,
            pipeline=Pipeline(make_comm_streams(cpu), settings=settings),
        )
        for layer in LAYERS:
            before = group.traffic.bytes_sent
            outs.append(transport.attend(layer, q[queries], k[keys], v[keys], SoftmaxParams(SCALE)))
            sent.append(group.traffic.bytes_sent - before)
    return queries, outs, sent


def on_rank(rank: int, port: int, cases):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=info.world_size))
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
    results = [on_one_rank(case_of, groups.sp) for case_of in cases]
    finalize()
    return results


def run_cases(levels: tuple[int, ...], cases):
    """Per case the results of all ranks."""
    sp = math.prod(levels)
    if sp == 1:
        return [[on_one_rank(case_of, SINGLE)] for case_of in cases]
    return list(zip(*run_ranks(on_rank, sp, free_port(), cases), strict=True))


@cache
def masks(name: str, layer: int, sequence: int, local_kv_head: int) -> torch.Tensor:
    """[T, T] of one sequence: which keys a query sees, pair by pair. Spans are given, so that the
    number of ranks does not matter."""
    sparse, _, _ = case(name, (1,))
    tokens, prompt_len, _ = LENGTHS[sequence]
    pattern = sparse.pattern(prompt_len)
    head = sparse.kv_heads[local_kv_head]
    return torch.tensor(
        [
            [
                pattern.sees(i, j, kv_head=head, layer=layer, prompt_len=prompt_len)
                for j in range(tokens)
            ]
            for i in range(tokens)
        ]
    )


@cache
def by_definition(name: str, layer: int) -> torch.Tensor:
    """Outputs in sequence order from masks made pair by pair."""
    sparse, layout, (q, k, v) = case(name, (1,))
    out = torch.empty_like(q)
    for sequence, first in enumerate(layout.keys.seq_starts()):
        rows = slice(first, first + LENGTHS[sequence][0])
        for local in range(len(sparse.kv_heads)):
            mask = masks(name, layer, sequence, local)
            for head in range(2 * local, 2 * local + 2):
                scores = (q[rows, head] @ k[rows, local].T * SCALE).masked_fill(~mask, -torch.inf)
                weights = torch.softmax(scores, -1).nan_to_num()  # a row without keys is zero
                out[rows, head] = weights @ v[rows, local]
    return out


LAYOUTS = [
    ((1,), [("gather",)]),
    ((2,), [("ring",), ("pass_q",)]),
    ((3,), [("gather",), ("ring",), ("pass_q",), ("ulysses",)]),
    ((4,), [("ring",), ("ulysses",)]),
    (
        (2, 2),
        [("ulysses", "gather"), ("gather", "pass_q"), ("ring", "ulysses"), ("pass_q", "ring")],
    ),
]


@pytest.mark.parametrize(("levels", "transports"), LAYOUTS)
def test_outputs_are_those_of_the_definition(levels, transports):
    expected = {name: [by_definition(name, layer) for layer in LAYERS] for name in PATTERNS}
    cases = [
        (name, levels, transport, order)
        for name in PATTERNS
        for transport in transports
        for order in (CONTIGUOUS, SCATTERED)
    ]
    for case_of, results in zip(cases, run_cases(levels, cases), strict=True):
        for number, wanted_SNH in enumerate(expected[case_of[0]] * 2):
            seen = torch.zeros(len(wanted_SNH))
            for index, outs, _ in results:
                wanted = wanted_SNH[index]
                torch.testing.assert_close(
                    outs[number], wanted, rtol=0, atol=5e-6, msg=str(case_of)
                )
                seen[index] += 1
            starts = case(case_of[0], levels)[1].keys.seq_starts()
            for first, (tokens, _, cached) in zip(starts, LENGTHS, strict=True):
                assert (seen[first : first + cached] == 0).all()
                assert (seen[first + cached : first + tokens] == 1).all()


def expected_bytes(case_of: tuple, layer: int, kv_parts: int) -> list[int]:
    """Bytes sent by each rank, pair by pair; a row goes to a rank once, if it is needed there."""
    sparse, layout, _ = case(*case_of)
    kv, item = range(len(sparse.kv_heads)), 4
    exchanges = prefill_exchanges(
        sparse.transports,
        sparse.sp_levels,
        num_heads=HEADS,
        num_kv_heads=len(kv),
        kv_parts=kv_parts,
    )
    ranks = range(len(layout.keys.counts))
    sent = [0 for _ in ranks]
    key_rank = {(r.sequence, p): r.rank for r in layout.keys.runs for p in range(r.start, r.end)}
    queries = [(r.sequence, p, r.rank) for r in layout.queries.runs for p in range(r.start, r.end)]
    visible = {
        (sequence, g): masks(case_of[0], layer, sequence, g)
        for sequence in range(len(LENGTHS))
        for g in kv
    }
    for exchange in exchanges[1:]:
        key_rows, query_rows = set(), set()  # (where computed, where from, row)
        for sequence, i, a in queries:
            pattern = sparse.pattern(LENGTHS[sequence][1])
            tail = not pattern.exact and i >= LENGTHS[sequence][1] - pattern.tail
            if tail != (exchange.queries == "tail"):
                continue
            for at in ranks:
                for heads, kv_part in exchange.heads(at):
                    for g in kv_part:
                        per_kv_head = len(heads) // len(kv_part)
                        first = heads.start + (g - kv_part.start) * per_kv_head
                        for j in visible[sequence, g][i].nonzero().flatten().tolist():
                            b = key_rank[sequence, j]
                            if exchange.takes(at, a, b):
                                key_rows.add((at, b, sequence, j, g))
                                for head in range(first, first + per_kv_head):
                                    query_rows.add((at, a, sequence, i, head))
        for at, b, *_ in key_rows:
            sent[b] += 2 * WIDTH * item * (at != b)
        for at, a, *_ in query_rows:
            sent[a] += WIDTH * item * (at != a)
            sent[at] += (WIDTH * item + 4) * (at != a)
    return sent


@pytest.mark.parametrize(
    ("levels", "settings"),
    [
        ((3,), [("two levels", ("gather",)), ("blocks", ("ring",)), ("paper", ("ulysses",))]),
        ((2, 2), [("two levels", ("ulysses", "gather")), ("three levels", ("pass_q", "ulysses"))]),
    ],
)
def test_only_visible_rows_travel(levels, settings):
    cases = [
        (name, levels, transports, order)
        for name, transports in settings
        for order in (CONTIGUOUS, SCATTERED)
    ]
    for case_of, results in zip(cases, run_cases(levels, cases), strict=True):
        cuts = [(layer, kv_parts) for kv_parts in (1, 2) for layer in LAYERS]
        for number, cut in enumerate(cuts):
            assert [sent[number] for _, _, sent in results] == expected_bytes(case_of, *cut)
