"""Decode steps through graphs give the tokens of steps without.

On the CPU "graphs" just call again, so that buffers, padding and buckets are real; on a GPU they
are captured.
"""

from __future__ import annotations

import os

import families
import pytest
from harness import free_port, run_ranks
from triton_device import DEVICES

LENGTHS = (40, 1, 64, 17, 101)
BLOCK = 8
NUM_BLOCKS = 96
STEPS = 9  # sequences open new blocks, and leave one by one
UNTOUCHED = 7.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama3-rope", "mistral-window"])
def test_same_tokens_and_no_block_written_that_is_not_a_sequences(name, device, tmp_path):
    pytest.importorskip("triton")
    families.save_family(name, tmp_path)
    prompts = families.prompts(LENGTHS, seed=8)
    (found,) = run_ranks(with_and_without, 1, str(tmp_path), prompts, device, free_port())
    assert found["rotated"] == found["plain"]
    assert found["graphs"] == found["plain"]
    # Batches 5, 4 .. 1 in buckets 8, 4, 2, 1, and all tables in the shortest one.
    assert found["captured"] == 4


def with_and_without(
    rank: int, folder: str, prompts: list[list[int]], device_type: str, port: int
) -> dict[str, object]:
    from unittest.mock import patch

    import torch

    from sps2_mega.attention.build import PrefillSetup
    from sps2_mega.checkpoint.load import load_weights
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.config import EngineConfig, ParallelConfig
    from sps2_mega.kernels.paged_kv import triton as paged_kv
    from sps2_mega.kernels.rotary_append import triton as rotary_append
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.worker.decode_graphs import CudaRecorder, DecodeGraphs, make_decode_graphs
    from sps2_mega.worker.executor import Executor

    os.environ["MASTER_PORT"] = str(port)
    info, device = from_environment(), torch.device(device_type)
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig())
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=120)
    source = open_checkpoint(folder)
    model = source.config
    models = {}
    for fused in (False, True):  # who rotates queries and keys: Megatron's layers, or our attention
        models[fused] = GPT(model, groups, dtype=torch.float32, device=device, fused_rotary=fused)
        load_weights(models[fused].weights(), source, model, tp_rank=0, tp=1)

    class CallsAgain:
        """A graph for the CPU: the result of each call lands where the first one's is."""

        def capture(self, work):
            result = work().clone()
            return lambda: result.copy_(work()), result

    found: dict[str, object] = {}
    for kind in ("plain", "rotated", "graphs"):
        gpt = models[kind != "plain"]
        pool = untouched_pool(model, device)
        graphs = None
        if kind == "graphs":
            assert make_decode_graphs(EngineConfig(), gpt, pool, groups, device) is None
            recorder = CudaRecorder(device) if device.type == "cuda" else CallsAgain()
            graphs = DecodeGraphs(gpt, pool, recorder, device)
        executor = Executor(
            gpt,
            model,
            pool,
            groups,
            prefill=PrefillSetup(transport="ulysses"),
            graphs=graphs,
            dtype=torch.float32,
            device=device,
        )
        # On the CPU the cache is written by torch, which knows no padding.
        with (
            patch("sps2_mega.attention.step.append", paged_kv.append),
            patch("sps2_mega.attention.step.rotate_and_append", rotary_append.rotate_and_append),
        ):
            found[kind], used = generated(executor, prompts)
        if graphs is not None:
            found["captured"] = len(graphs)
        for layer in range(model.num_layers):
            for cache in pool.layer(layer):
                assert (cache[used:] == UNTOUCHED).all()
    finalize()
    return found


def untouched_pool(model, device):
    """A cache whose every value is UNTOUCHED."""
    import torch

    from sps2_mega.kv_cache.pool import KVPool

    pool = KVPool(
        num_layers=model.num_layers,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=torch.float32,
        device=device,
    )
    with torch.inference_mode():
        for layer in range(model.num_layers):
            for cache in pool.layer(layer):
                cache.fill_(UNTOUCHED)
    return pool


def generated(executor, prompts: list[list[int]]) -> tuple[list[list[int | None]], int]:
    """Tokens of every step, and how many blocks from the first on were given to sequences."""
    from sps2_mega.types import DecodeItem, ForwardMode, PrefillItem, SamplingParams, StepPlan

    items, used = [], 0
    for seq_id, prompt in enumerate(prompts):
        count = -(-len(prompt) // BLOCK)
        params = SamplingParams(seed=seq_id, max_tokens=STEPS, repetition_penalty=1.1, logprobs=1)
        blocks = list(range(used, used + count))
        used += count
        items.append(
            PrefillItem(
                seq_id, prompt, len(prompt), [0] * count, blocks, params, seq_id, 0, len(prompt)
            )
        )
    output = executor.execute(StepPlan(0, ForwardMode.PREFILL, items, [], []))
    steps, last = [output.token_ids], dict(enumerate(output.token_ids))
    for step in range(STEPS):
        released = []
        if step % 2 == 1 and len(items) > 1:
            released = [items.pop(0).seq_id]
        decodes = []
        for item in items:
            position, new_block = len(item.token_ids) + step, None
            if position % BLOCK == 0:
                new_block = (0, used)
                used += 1
            decodes.append(DecodeItem(item.seq_id, last[item.seq_id], position, new_block))
        output = executor.execute(StepPlan(1 + step, ForwardMode.DECODE, [], decodes, released))
        steps.append(output.token_ids)
        last = {item.seq_id: t for item, t in zip(items, output.token_ids, strict=True)}
    return steps, used
