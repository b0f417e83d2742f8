"""Two SP ranks on one device, exchanging through gloo, with streams, events and communicators.

NCCL refuses two ranks on one GPU, so its own paths are not covered here. The same runs on the CPU,
against which the test itself is checked.
"""

from __future__ import annotations

import os

import families
import pytest
from harness import free_port, run_ranks

VARIANTS = [
    ("ulysses", "off"),
    ("ulysses", "on"),
    ("gather", "on"),
    ("ring", "on"),
    ("pass_q", "on"),
    ("csa", "off"),
    ("csa", "on"),
]
LENGTHS = (333, 40, 1)
DECODE_STEPS = 3
BLOCK = 16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_variant_gives_the_tokens_of_one_rank(tmp_path, device):
    families.save_family("llama3-rope", tmp_path)
    prompts = families.prompts(LENGTHS, seed=5)
    alone = run_ranks(tokens_on_rank, 1, str(tmp_path), prompts, "cpu", free_port())[0]
    together = run_ranks(tokens_on_rank, 2, str(tmp_path), prompts, device, free_port())
    for variant in VARIANTS:
        expected = alone["csa" if variant[0] == "csa" else "ulysses", "off"]
        for tokens in together:
            assert tokens[variant] == expected, variant


def tokens_on_rank(
    rank: int, folder: str, prompts: list[list[int]], device_type: str, port: int
) -> dict[tuple[str, str], list[list[int | None]]]:
    """Variant -> tokens of the prefill and of each decode step."""
    import torch

    from sps2_mega.attention.build import PrefillSetup
    from sps2_mega.attention.planner.attention_choice import sparse_prefill
    from sps2_mega.checkpoint.load import load_weights
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.config import CSAConfig, EngineConfig, ParallelConfig
    from sps2_mega.engine.startup.attention_setup import make_pipeline
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.worker.executor import Executor

    os.environ["MASTER_PORT"] = str(port)
    info, device = from_environment(), torch.device(device_type)
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(tp=1, sp=info.world_size))
    # Groups for the CPU are gloo's, which takes tensors of a GPU too.
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=120)
    source = open_checkpoint(folder)
    model = source.config
    gpt = GPT(model, groups, dtype=torch.float32, device=device)
    load_weights(gpt.weights(), source, model, tp_rank=0, tp=1)
    found = {}
    for transport, mode in VARIANTS:
        csa = CSAConfig(degrees=(1, 2), spans=(112,), sinks=3, halo=5, tail=7)
        config = EngineConfig(
            csa=csa if transport == "csa" else CSAConfig(degrees=(1,)),
            pipeline=mode,  # type: ignore[arg-type]
            micro_batches=3 if mode == "on" else None,
        )
        name = "gather" if transport == "csa" else transport
        pool = KVPool(
            num_layers=model.num_layers,
            num_blocks=64,
            block_size=BLOCK,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=torch.float32,
            device=device,
        )
        setup = PrefillSetup(
            transport=name,
            sparse=sparse_prefill(config, model, topology, name, tp_rank=0),
            pipeline=make_pipeline(config, groups, device)[0],
        )
        executor = Executor(
            gpt, model, pool, groups, prefill=setup, dtype=torch.float32, device=device
        )
        found[transport, mode] = generated(executor, prompts, sp=info.world_size)
    finalize()
    return found


def generated(executor, prompts: list[list[int]], *, sp: int) -> list[list[int | None]]:
    from sps2_mega.kv_cache.placement import prompt_block_ranks
    from sps2_mega.types import DecodeItem, ForwardMode, PrefillItem, SamplingParams, StepPlan

    params = SamplingParams(max_tokens=DECODE_STEPS + 1, temperature=0.0)
    free, items = [64] * sp, []

    def taken(rank: int) -> int:
        free[rank] -= 1
        return free[rank]

    for seq_id, prompt in enumerate(prompts):
        ranks = prompt_block_ranks(-(-len(prompt) // BLOCK), free, "contiguous")
        ids = [taken(rank) for rank in ranks]
        items.append(
            PrefillItem(seq_id, prompt, len(prompt), ranks, ids, params, 0, 0, len(prompt))
        )
    output = executor.execute(StepPlan(0, ForwardMode.PREFILL, items, [], []))
    tokens = [output.token_ids]
    for step in range(DECODE_STEPS):
        decodes = []
        for item, token in zip(items, tokens[-1], strict=True):
            position = len(item.token_ids) + step
            new_block = None
            if position % BLOCK == 0:
                rank = position // BLOCK % sp
                new_block = (rank, taken(rank))
            decodes.append(DecodeItem(item.seq_id, token, position, new_block))
        output = executor.execute(StepPlan(1 + step, ForwardMode.DECODE, [], decodes, []))
        tokens.append(output.token_ids)
    return tokens
