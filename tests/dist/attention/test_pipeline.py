"""Pipelined transports give the unpipelined result and the one of one rank, whatever the cut.

They also send the same bytes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import default_group, run_ranks

from sps2_mega.attention.build import make_transport
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PipelineSettings
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.kernels.attention.reference import attend_run
from sps2_mega.parallel.groups import SINGLE, Group

BLOCK, WIDTH = 4, 16
CPU = torch.device("cpu")
HEADS = {"mha": (6, 6), "gqa": (8, 2), "one kv head": (4, 1)}
# name -> (starts, ends, block -> rank of each sequence, given the number of ranks)
STEPS = {
    "one token": ([0], [1], lambda sp: [[0]]),
    "contiguous, last block half full": (
        [0],
        [46],
        lambda sp: [[b * sp // 12 for b in range(12)]],
    ),
    "ragged, the last rank has no tokens": (
        [0, 0, 0],
        [3, 41, 17],
        lambda sp: [
            [0],
            [b % max(1, sp - 1) for b in range(11)],
            [max(0, sp - 2 - b) for b in range(5)],
        ],
    ),
    "behind cached tokens": (
        [13, 0, 30],
        [29, 9, 31],
        lambda sp: [
            [b * sp // 8 for b in range(8)],
            [b % sp for b in range(3)],
            [(b + 1) % sp for b in range(8)],
        ],
    ),
}
SETTINGS = {
    "off": PipelineSettings(mode="off"),
    "on": PipelineSettings(mode="on"),
    **{f"{n} parts": PipelineSettings(micro_batches=n) for n in (3, 7, 100)},
}


def groups(sp):
    """The group of all ranks, and another communicator over the same ones."""
    if sp == 1:
        return SINGLE, SINGLE
    import torch.distributed as dist

    world = default_group()
    rank = dist.get_rank()
    forth = Group(rank=rank, size=sp, handle=world)
    return forth, Group(rank=rank, size=sp, handle=dist.new_group(), traffic=forth.traffic)


def tensors(layout, num_heads, num_kv_heads, dtype):
    """Q, K, V of all tokens in sequence order, equal on every rank."""
    generator = torch.Generator().manual_seed(1)
    queries, keys = (sum(x.counts) for x in (layout.queries, layout.keys))
    return [
        torch.randn(count, heads, WIDTH, generator=generator).to(dtype)
        for count, heads in ((queries, num_heads), (keys, num_kv_heads), (keys, num_kv_heads))
    ]


def local(x, layout, rank):
    """A rank's rows, in its local order."""
    rows = torch.empty(layout.counts[rank], dtype=torch.int64)
    starts = layout.seq_starts()
    for run in layout.local_runs(rank):
        first = starts[run.sequence] - layout.first[run.sequence]
        rows[run.local] = torch.arange(first + run.start, first + run.end)
    return x[rows]


def errors_on_rank(rank, sp, transport):
    """{case: (largest difference to one rank, equal to the uncut result, bytes equal)}"""
    group, back = groups(sp)
    results = {}
    for (step, (starts, ends, ranks)), (heads, counts), dtype, window in itertools.product(
        STEPS.items(), HEADS.items(), (torch.float32, torch.bfloat16), (None, 7)
    ):
        if window is not None and dtype == torch.bfloat16:
            continue
        layout = build_layout(ranks(sp), ends, starts=starts, block_size=BLOCK, sp_size=sp)
        q, k, v = tensors(layout, *counts, dtype)
        softmax = SoftmaxParams(0.3, window=window)
        expected = local(one_rank(layout, q, k, v, softmax), layout.queries, rank)
        mine = (
            local(q, layout.queries, rank),
            local(k, layout.keys, rank),
            local(v, layout.keys, rank),
        )
        uncut = None
        for name, settings in SETTINGS.items():
            pipeline = Pipeline(make_comm_streams(CPU), back, settings=settings)
            attention = make_transport(transport, layout, group, CPU, pipeline)
            before = group.traffic.bytes_sent
            outs = [attention.attend(layer, *mine, softmax) for layer in range(2)]
            sent = group.traffic.bytes_sent - before
            assert torch.equal(outs[0], outs[1])
            seconds = pipeline.take_seconds()
            assert 0 <= seconds.overlap <= 1 and (seconds.total_comm_s > 0) == (sp > 1)
            uncut = uncut or (outs[0], sent)
            difference = (
                (outs[0].float() - expected.float()).abs().max().item() if len(expected) else 0.0
            )
            close = torch.allclose(outs[0], uncut[0], atol=1e-6 if dtype == torch.float32 else 2e-2)
            results[step, heads, str(dtype), window, name] = (difference, close, sent == uncut[1])
    return results


def one_rank(layout, q, k, v, softmax):
    """All queries in sequence order, by the reference."""
    outs = []
    queries, keys = layout.queries, layout.keys
    for first, last, q_at, k_at in zip(
        queries.first, queries.last, queries.seq_starts(), keys.seq_starts(), strict=True
    ):
        out, _ = attend_run(
            q[q_at : q_at + last - first].float(),
            k[k_at : k_at + last].float(),
            v[k_at : k_at + last].float(),
            scale=softmax.scale,
            q_start=first,
            window=softmax.window,
        )
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.parametrize(
    ("sp", "transport"),
    [
        (1, "ulysses"),
        (2, "ulysses"),
        (3, "ulysses"),
        (4, "ulysses"),
        (3, "gather"),
        (3, "ring"),
        (1, "pass_q"),
        (3, "pass_q"),
    ],
)
def test_any_cut_equals_one_rank(sp, transport):
    for result in run_ranks(errors_on_rank, sp, sp, transport, timeout=300):
        for case, (difference, close, same_bytes) in result.items():
            assert difference < (1e-5 if "float32" in case[2] else 2e-2), (case, difference)
            assert close and same_bytes, case
