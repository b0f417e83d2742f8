"""Run checkpoints through the model on all ranks of a test and compare logits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from harness import free_port, run_ranks

TRANSPORTS = ("ulysses", "gather", "ring", "pass_q")


def assert_logits(
    expected: dict[str, list[torch.Tensor]],
    folders: dict[str, Path],
    prompts: list[list[int]],
    *,
    tp: int,
    sp: int,
    tolerance: float,
) -> None:
    """Logits [T, vocab] of every prompt and folder equal `expected`, on each transport."""
    measured = largest_differences(expected, folders, prompts, tp=tp, sp=sp)
    for (name, transport), (difference, where) in measured.items():
        assert difference < tolerance, (name, transport, *where, difference)


def largest_differences(
    expected: dict[str, list[torch.Tensor]],
    folders: dict[str, Path],
    prompts: list[list[int]],
    *,
    tp: int,
    sp: int,
    transports: tuple[str, ...] = TRANSPORTS,
    timeout: float = 300,
) -> dict[tuple[str, str], tuple[float, tuple[int, int]]]:
    """(folder's name, transport) -> (largest difference, (sequence, first position) of its run).

    A difference is NaN where a logit is. Every logit is there, once on each TP rank.
    """
    texts = {name: str(folder) for name, folder in folders.items()}
    results = run_ranks(
        logits_on_rank, tp * sp, texts, prompts, tp, sp, free_port(), transports, timeout=timeout
    )
    found: dict[tuple[str, str], tuple[float, tuple[int, int]]] = {}
    for name, references in expected.items():
        for transport in transports:
            seen = [torch.zeros(len(logits)) for logits in references]
            largest = (-1.0, (0, 0))
            for result in results:
                for sequence, start, logits in result[name, transport]:
                    reference = references[sequence][start : start + len(logits)]
                    difference = (logits - reference).abs().max().item()
                    if not difference <= largest[0]:
                        largest = difference, (sequence, start)
                    seen[sequence][start : start + len(logits)] += 1
            for counts in seen:  # each TP rank has every logit of its tokens
                assert (counts == tp).all()
            found[name, transport] = largest
    return found


def logits_on_rank(
    rank: int,
    folders: dict[str, str],
    prompts: list[list[int]],
    tp: int,
    sp: int,
    port: int,
    transports: tuple[str, ...] = TRANSPORTS,
) -> dict[tuple[str, str], list[tuple[int, int, Any]]]:
    """(folder's name, transport) -> [(sequence, first position, logits)] of this rank's tokens."""
    from sps2_mega.checkpoint.load import load_weights
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import finalize

    groups = joined_groups(port, tp=tp, sp=sp)
    results = {}
    for name, folder in folders.items():
        source = open_checkpoint(folder)
        model = GPT(source.config, groups, dtype=torch.float32, device=torch.device("cpu"))
        load_weights(model.weights(), source, source.config, tp_rank=groups.tp.rank, tp=tp)
        model.pack()
        for transport in transports:
            layout_name = "contiguous" if transport == "ulysses" else "zigzag"
            results[name, transport] = prompt_logits(
                model, source.config, prompts, groups, transport, layout_name
            )
    finalize()
    return results


def joined_groups(port: int, *, tp: int, sp: int) -> Any:
    """In a rank: the groups of a job of `tp` x `sp` ranks that meet at `port`."""
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(tp=tp, sp=sp))
    return initialize(store, info, topology, device=torch.device("cpu"), timeout_s=120)


def prompt_logits(
    model: Any,
    config: Any,
    prompts: list[list[int]],
    groups: Any,
    transport: str,
    layout_name: str,
    *,
    num_blocks: int = 128,
) -> list[tuple[int, int, Any]]:
    """[(sequence, first position, logits)] of this rank's tokens of the prompts, in one step."""
    from sps2_mega.attention.build import PrefillSetup
    from sps2_mega.attention.layout.token_layout import build_layout
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.worker.batching import prefill_input
    from sps2_mega.worker.local_tables import LocalTables

    cpu, tp, sp, block_size = torch.device("cpu"), groups.tp.size, groups.sp.size, 16
    pool = KVPool(
        num_layers=config.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=max(config.num_kv_heads, tp) // tp,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=cpu,
    )
    items = prefill_items(prompts, [num_blocks] * sp, block_size, layout_name)
    tables = LocalTables(rank=groups.sp.rank, block_size=block_size)
    setup = PrefillSetup(transport=transport)
    step = prefill_input(items, tables, pool, groups.sp, setup, device=cpu)
    logits = model(
        step.tokens_T, step.positions_T, torch.arange(len(step.tokens_T)), step.attention
    )
    layout = build_layout(
        [item.block_ranks for item in items],
        [len(item.token_ids) for item in items],
        block_size=block_size,
        sp_size=sp,
    )
    return [
        (run.sequence, run.start, logits[run.local_start :][: run.end - run.start].clone())
        for run in layout.queries.local_runs(groups.sp.rank)
    ]


def prefill_items(
    prompts: list[list[int]], free: list[int], block_size: int, layout_name: str
) -> list[Any]:
    """A PrefillItem per prompt, whole; blocks of a rank are given from the last one down."""
    from sps2_mega.kv_cache.placement import prompt_block_ranks
    from sps2_mega.types import PrefillItem, SamplingParams

    items = []
    for sequence, prompt in enumerate(prompts):
        ranks = prompt_block_ranks(-(-len(prompt) // block_size), free, layout_name)
        ids = []
        for rank in ranks:
            free[rank] -= 1
            ids.append(free[rank])
        length = len(prompt)
        items.append(
            PrefillItem(sequence, prompt, length, ranks, ids, SamplingParams(), 0, 0, length)
        )
    return items
