"""Every family on every layout and transport gives transformers' logits, and its greedy text."""

from __future__ import annotations

import os
from pathlib import Path

import families
import pytest
import torch
from harness import free_port, run_ranks

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
TRANSPORTS = ("ulysses", "gather")
GREEDY_LENGTHS = (1, 3, 16, 17, 50, 129, 333, 700)
NEW_TOKENS = 64
TOLERANCE = 1e-4  # float32, logits of magnitude ~5


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Per family: folder, logits of every position of every prompt, greedy continuations."""
    answers = {}
    for name in families.FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        model = families.save_family(name, folder)
        with torch.inference_mode():
            logits = [model(torch.tensor([p])).logits[0] for p in families.prompts()]
            texts = []
            for prompt in families.prompts(GREEDY_LENGTHS, seed=1):
                ids = torch.tensor([prompt])
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )
                texts.append(out[0, len(prompt) :].tolist())
        answers[name] = (folder, logits, texts)
    return answers


@pytest.mark.parametrize(("tp", "sp"), LAYOUTS, ids=lambda degree: str(degree))
def test_logits(oracle, tp, sp):
    folders = {name: str(folder) for name, (folder, _, _) in oracle.items()}
    results = run_ranks(logits_on_rank, tp * sp, folders, tp, sp, free_port(), timeout=300)
    for name, (_, expected, _) in oracle.items():
        for transport in TRANSPORTS:
            seen = [torch.zeros(len(logits)) for logits in expected]
            for rank_result in results:
                for sequence, start, logits in rank_result[name, transport]:
                    reference = expected[sequence][start : start + len(logits)]
                    difference = (logits - reference).abs().max().item()
                    assert difference < TOLERANCE, (name, transport, sequence, start, difference)
                    seen[sequence][start : start + len(logits)] += 1
            for counts in seen:  # each TP rank has every logit of its tokens
                assert (counts == tp).all()


def logits_on_rank(rank, folders, tp, sp, port):
    """(family, transport) -> [(sequence, first position, logits)] of this rank's tokens."""
    from sps2_mega.attention.layout import build_layout
    from sps2_mega.checkpoint.load import load_weights
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.config import ParallelConfig
    from sps2_mega.engine.batching import prefill_input
    from sps2_mega.engine.local_tables import LocalTables
    from sps2_mega.kv_cache.placement import prompt_block_ranks
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.types import PrefillItem, SamplingParams

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(tp=tp, sp=sp))
    groups = initialize(store, info, topology, device=cpu, timeout_s=120)
    results = {}
    block_size, num_blocks = 16, 128
    for name, folder in folders.items():
        source = open_checkpoint(folder)
        config = source.config
        model = GPT(config, groups, dtype=torch.float32, device=cpu)
        load_weights(model.weights(), source, config, tp_rank=groups.tp.rank, tp=tp)
        pool = KVPool(
            num_layers=config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=max(config.num_kv_heads, tp) // tp,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=cpu,
        )
        for transport, layout_name in zip(TRANSPORTS, ("contiguous", "zigzag"), strict=True):
            free, items = [num_blocks] * sp, []
            for sequence, prompt in enumerate(families.prompts()):
                ranks = prompt_block_ranks(-(-len(prompt) // block_size), free, layout_name)
                ids = []
                for block_rank in ranks:
                    free[block_rank] -= 1
                    ids.append(free[block_rank])
                items.append(
                    PrefillItem(sequence, prompt, len(prompt), ranks, ids, SamplingParams(), 0)
                )
            tables = LocalTables(rank=groups.sp.rank, block_size=block_size)
            step = prefill_input(items, tables, pool, groups.sp, transport=transport, device=cpu)
            rows = torch.arange(len(step.tokens_T))
            logits = model(step.tokens_T, step.positions_T, rows, step.attention)
            layout = build_layout(
                [item.block_ranks for item in items],
                [len(item.token_ids) for item in items],
                block_size=block_size,
                sp_size=sp,
            )
            results[name, transport] = [
                (run.sequence, run.start, logits[run.local_start :][: run.end - run.start].clone())
                for run in layout.local_runs(groups.sp.rank)
            ]
    finalize()
    return results


@pytest.mark.parametrize(("tp", "sp"), LAYOUTS, ids=lambda degree: str(degree))
def test_greedy_text_of_a_mixed_batch(oracle, tp, sp):
    for number, (name, (folder, _, expected)) in enumerate(oracle.items()):
        transport = TRANSPORTS[(number + tp) % 2]
        port = free_port()
        results = run_ranks(
            generate_on_rank, tp * sp, str(folder), tp, sp, transport, port, timeout=300
        )
        assert results[0] == expected, (name, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_short_prompt_leaves_ranks_without_tokens(oracle, transport):
    folder, _, expected = oracle["qwen3"]
    port = free_port()
    results = run_ranks(generate_on_rank, 4, str(folder), 1, 4, transport, port, 1, timeout=300)
    assert results[0] == expected[:1]


def generate_on_rank(rank, folder: str, tp, sp, transport, port, num_prompts=None):
    """Greedy tokens of the prompts (rank 0), through the engine, with a cache so small that it preempts."""
    from sps2_mega.config import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
    from sps2_mega.engine.engine import Engine
    from sps2_mega.types import SamplingParams

    os.environ["MASTER_PORT"] = str(port)
    assert Path(folder).is_dir()
    engine = Engine.start(
        EngineConfig(
            model=folder,
            dtype="float32",
            transport=transport,
            parallel=ParallelConfig(tp=tp, sp=sp),
            cache=CacheConfig(num_blocks=112 // sp),
            scheduler=SchedulerConfig(max_prefill_tokens=512),
        )
    )
    if not engine.is_driver:
        engine.run_worker()
        return None
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    prompts = families.prompts(GREEDY_LENGTHS, seed=1)[:num_prompts]
    for number, prompt in enumerate(prompts):
        refusal = engine.add_request(str(number), prompt, params)
        assert refusal is None
    finished = {}
    while engine.has_work():
        for output in engine.step():
            finished[int(output.request_id)] = output.completions[0].token_ids
    assert engine.stats().kv_usage == 0.0
    engine.shutdown()
    return [finished[number] for number in range(len(prompts))]
