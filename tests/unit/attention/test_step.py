"""A step's attention writes each layer's keys once, then attends, whatever the kind of step.

Sums of partials take the merge that suits the device.
"""

from __future__ import annotations

import pytest
import torch

from sps2_mega.attention import step
from sps2_mega.attention.build import PrefillSetup
from sps2_mega.attention.step import Rotation, StepAttention
from sps2_mega.attention.transports import partials
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.attention.transports.partials import PartialSum
from sps2_mega.kv_cache.pool import KVPool
from sps2_mega.parallel.groups import SINGLE
from sps2_mega.types import DecodeItem, PrefillItem, SamplingParams
from sps2_mega.worker.batching import decode_input, hybrid_input, prefill_input
from sps2_mega.worker.local_tables import LocalTables

CPU, LAYERS, BLOCK, HEADS, KV_HEADS, WIDTH = torch.device("cpu"), 3, 4, 4, 2, 8
OLD, NEW = 6, 5  # tokens of the sequence that decodes, and of the one being prefilled
SOFTMAX = SoftmaxParams(0.3)


@pytest.fixture
def written(monkeypatch):
    """Tokens of each write to the cache, in order."""
    counts = []
    for name in ("append", "rotate_and_append"):
        write = getattr(step, name)

        def counted(*args, write=write, **rest):
            counts.append(len(args[2]))
            write(*args, **rest)

        monkeypatch.setattr(step, name, counted)
    return counts


class OneRank:
    """Two sequences on one rank; sequence 0 is prefilled at once, so that it can decode."""

    def __init__(self) -> None:
        self.pool = KVPool(
            num_layers=LAYERS,
            num_blocks=8,
            block_size=BLOCK,
            num_kv_heads=KV_HEADS,
            head_dim=WIDTH,
            dtype=torch.float32,
            device=CPU,
        )
        self.tables = LocalTables(rank=0, block_size=BLOCK)
        run(self.prefill(0, OLD, [1, 2]), torch.Generator().manual_seed(0))

    def prefill(self, seq_id: int, tokens: int, blocks: list[int], *, chunked: bool = False):
        from sps2_mega.attention.pipeline.executor import plain_pipeline

        item = PrefillItem(
            seq_id,
            list(range(tokens)),
            tokens,
            [0] * len(blocks),
            blocks,
            SamplingParams(),
            seq_id,
            0,
            tokens,
        )
        setup = PrefillSetup(transport="gather", pipeline=plain_pipeline(CPU))
        return prefill_input(
            [item], self.tables, self.pool, SINGLE, setup, device=CPU, chunked=chunked
        )

    def decode(self):
        item = DecodeItem(0, 7, OLD, None)
        return decode_input(
            [item], self.tables, self.pool, SINGLE, window=None, dtype=torch.float32, device=CPU
        )


def run(made, generator, *, rotated: bool = False) -> torch.Tensor:
    """Outputs [layers, T, N, H] of random q, k and v."""
    count = len(made.tokens_T)
    rotation = None
    if rotated:
        angles = torch.randn(count, WIDTH // 2, generator=generator)
        rotation = Rotation(angles.cos(), angles.sin())
    outs = []
    for layer in range(LAYERS):
        q, k, v = (
            torch.randn(count, heads, WIDTH, generator=generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        outs.append(made.attention.run_layer(layer, q, k, v, SOFTMAX, rotation))
    return torch.stack(outs)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_hybrid_step_writes_each_layers_keys_once(written, rotated):
    rank = OneRank()
    written.clear()
    made = hybrid_input(rank.prefill(1, NEW, [3, 4]), rank.decode())
    out = run(made, torch.Generator().manual_seed(1), rotated=rotated)
    assert written == [NEW + 1] * LAYERS
    assert out.shape == (LAYERS, NEW + 1, HEADS, WIDTH)


def test_a_hybrid_step_attends_as_both_kinds_alone():
    generator = torch.Generator().manual_seed(2)
    qkv = [
        torch.randn(NEW + 1, heads, WIDTH, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    both = OneRank()
    hybrid = hybrid_input(both.prefill(1, NEW, [3, 4]), both.decode())
    alone = OneRank()
    prefill, decode = alone.prefill(1, NEW, [3, 4]), alone.decode()
    for layer in range(LAYERS):
        together = hybrid.attention.run_layer(layer, *qkv, SOFTMAX)
        first = prefill.attention.run_layer(layer, *(x[:NEW] for x in qkv), SOFTMAX)
        second = decode.attention.run_layer(layer, *(x[NEW:] for x in qkv), SOFTMAX)
        assert torch.equal(together, torch.cat([first, second]))
        for one, other in zip(both.pool.layer(layer), alone.pool.layer(layer), strict=True):
            assert torch.equal(one, other)


def test_chunks_are_written_once_and_a_layer_is_told_with_its_last_chunk(written):
    rank = OneRank()
    written.clear()
    made = rank.prefill(1, NEW, [3, 4], chunked=True)
    chunks, told = made.attention.kind, []
    made.attention.on_layer = told.append
    for layer in range(LAYERS):
        for start, end in ((0, 2), (2, NEW)):
            rows = chunks.begin(start, end)
            made.attention.select_rows(rows, ends_layer=end == NEW)
            assert told == list(range(layer))
            new = (torch.randn(end - start, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS))
            made.attention.run_layer(layer, *new, SOFTMAX)
    assert told == list(range(LAYERS))
    assert written == [2, NEW - 2] * LAYERS


def test_keys_are_in_the_cache_before_attention_begins():
    pool = OneRank().pool
    slots, seen = torch.tensor([20, 9]), []

    class Looks:
        def attend(self, layer, q_TNH, k_TKH, v_TKH, softmax):
            seen.append([x.flatten(0, 1)[slots].clone() for x in pool.layer(layer)])
            return q_TNH

    q, k, v = (torch.randn(2, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    StepAttention(pool, slots, Looks()).run_layer(1, q, k, v, SOFTMAX)
    assert torch.equal(seen[0][0], k) and torch.equal(seen[0][1], v)


def test_a_sum_of_partials_takes_the_merge_that_dispatch_chooses(monkeypatch):
    from sps2_mega.kernels.lse import dispatch

    taken = []

    def merge_two(*partials):
        taken.append([tuple(x.shape) for x in partials])
        return dispatch.merge_two(*partials)

    monkeypatch.setattr(partials, "merge_two", merge_two)
    like = torch.zeros(5, HEADS, WIDTH)
    total = PartialSum(like)
    out, lse = torch.randn(3, 2, WIDTH), torch.randn(3, 2)
    total.add(out, lse, rows=slice(1, 4), heads=slice(2, 4))
    numbers = torch.tensor([0, 19])
    total.add_single_rows([numbers], torch.ones(2, WIDTH), torch.zeros(2))
    assert taken == [
        [(3, 2, WIDTH), (3, 2), (3, 2, WIDTH), (3, 2)],
        [(2, WIDTH), (2,), (2, WIDTH), (2,)],
    ]
    found, sums = total.partial()
    torch.testing.assert_close(found[1:4, 2:], out)
    torch.testing.assert_close(sums[1:4, 2:], lse)
    assert (found.flatten(0, 1)[numbers] == 1).all()
    assert (found[2, :2] == 0).all() and (sums[2, :2] == -torch.inf).all()
