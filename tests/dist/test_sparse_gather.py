"""Sparse prefill on several ranks equals the pair-by-pair definition of CSA, and sends only what is seen."""

from __future__ import annotations

import os

import families
import pytest
import torch
from engine_run import run_engine
from harness import free_port, run_ranks

from sps2_mega.attention.layout import build_layout
from sps2_mega.attention.pattern import CSAPattern
from sps2_mega.attention.rule import ScoreRule
from sps2_mega.attention.spans import SparsePrefill
from sps2_mega.attention.sparse_gather import SparseGather
from sps2_mega.config import CSAConfig
from sps2_mega.parallel.groups import SINGLE, Group

BLOCK_SIZE, HEADS, WIDTH, SCALE = 4, 6, 8, 0.35
PATTERNS = {
    "two levels": dict(degrees=(1, 4), spans=(24,), sinks=3, halo=5, tail=7),
    "paper": dict(degrees=(1, 2), spans=(20,), sinks=0, halo=0, tail=0, sample_queries=True),
    "three levels": dict(degrees=(1, 2, 3), spans=(8, 32), sinks=1, halo=2, tail=1),
    "strided own cell": dict(degrees=(2, 4), spans=(16,), sinks=2, halo=1, tail=5),
    "spans of ranks": dict(degrees=(1, 4), spans=None, sinks=4, halo=8, tail=8),
    "no far keys but the tail's": dict(degrees=(1, 1000), spans=(16,), sinks=0, halo=0, tail=20),
}
# (tokens, prompt tokens): the second sequence is recomputed after a preemption, the third is all tail
LENGTHS = [(101, 101), (70, 61), (3, 3), (40, 40)]


def case(name: str, sp: int):
    csa = CSAConfig(**(dict(sample_queries=False) | PATTERNS[name]))
    sparse = SparsePrefill(csa=csa, sp_levels=(sp,), kv_heads=range(3, 6), block_size=BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    lens = [tokens for tokens, _ in LENGTHS]
    ranks = [
        sorted(torch.randint(0, sp, (-(-n // BLOCK_SIZE),), generator=generator).tolist())
        for n in lens
    ]
    layout = build_layout(ranks, lens, block_size=BLOCK_SIZE, sp_size=sp)
    qkv = [
        torch.randn(sum(lens), heads, WIDTH, generator=generator)
        for heads in (HEADS, len(sparse.kv_heads), len(sparse.kv_heads))
    ]
    return sparse, layout, qkv


def on_one_rank(rank: int, sp: int, name: str, group: Group):
    """Outputs of this rank's tokens and rows sent, for two layers, and where the tokens are."""
    sparse, layout, (q, k, v) = case(name, sp)
    starts = layout.keys.seq_starts()
    index = torch.cat(
        [torch.empty(0, dtype=torch.int64)]
        + [
            torch.arange(run.start, run.end) + starts[run.sequence]
            for run in layout.queries.local_runs(group.rank)
        ]
    )
    prompt_lens = [prompt for _, prompt in LENGTHS]
    transport = SparseGather(
        layout,
        [sparse.pattern(n) for n in prompt_lens],
        prompt_lens,
        sparse.kv_heads,
        group,
        torch.device("cpu"),
    )
    outs, sent = [], []
    for layer in (0, 5):
        outs.append(transport.attend(layer, q[index], k[index], v[index], ScoreRule(SCALE)))
        sent.append(transport.rows_sent(layer))
    return index, outs, sent


def on_rank(rank: int, port: int, sp: int, name: str):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=sp))
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
    result = on_one_rank(rank, sp, name, groups.sp)
    finalize()
    return result


def by_definition(name: str, sp: int, layer: int) -> torch.Tensor:
    """Outputs in sequence order from a mask made pair by pair."""
    sparse, layout, (q, k, v) = case(name, sp)
    out = torch.empty_like(q)
    for (tokens, prompt_len), first in zip(LENGTHS, layout.keys.seq_starts(), strict=True):
        pattern = sparse.pattern(prompt_len)
        rows = slice(first, first + tokens)
        for head in range(HEADS):
            local = head * len(sparse.kv_heads) // HEADS
            mask = torch.tensor(
                [
                    [
                        pattern.sees(
                            i, j, kv_head=sparse.kv_heads[local], layer=layer, prompt_len=prompt_len
                        )
                        for j in range(tokens)
                    ]
                    for i in range(tokens)
                ]
            )
            scores = (q[rows, head] @ k[rows, local].T * SCALE).masked_fill(~mask, -torch.inf)
            weights = torch.softmax(scores, -1).nan_to_num()  # a row without keys is zero
            out[rows, head] = weights @ v[rows, local]
    return out


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("sp", [1, 2, 3, 4])
def test_outputs_are_those_of_the_definition(name, sp):
    if sp == 1:
        results = [on_one_rank(0, 1, name, SINGLE)]
    else:
        results = run_ranks(on_rank, sp, free_port(), sp, name)
    for number, layer in enumerate((0, 5)):
        expected = by_definition(name, sp, layer)
        seen = torch.zeros(len(expected))
        for index, outs, _ in results:
            torch.testing.assert_close(outs[number], expected[index], rtol=0, atol=3e-6)
            seen[index] += 1
        assert (seen == 1).all()


def test_only_visible_rows_travel():
    """Counted pair by pair: a (key, head) row is sent to a rank once if a query there sees it."""
    sp, name = 3, "two levels"
    results = run_ranks(on_rank, sp, free_port(), sp, name)
    sparse, layout, _ = case(name, sp)
    for number, layer in enumerate((0, 5)):
        expected = [0] * sp
        for key_run in layout.keys.runs:
            prompt_len = LENGTHS[key_run.sequence][1]
            pattern: CSAPattern = sparse.pattern(prompt_len)
            for target in range(sp):
                asking = [
                    i
                    for run in layout.queries.local_runs(target)
                    if run.sequence == key_run.sequence
                    for i in range(run.start, min(run.end, prompt_len - pattern.tail))
                ]
                for j in range(key_run.start, key_run.end):
                    for head in sparse.kv_heads:
                        expected[key_run.rank] += target != key_run.rank and any(
                            pattern.sees(i, j, kv_head=head, layer=layer, prompt_len=prompt_len)
                            for i in asking
                        )
        assert [sent[number] for _, _, sent in results] == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-one-kv-head")
    families.save_family("llama-one-kv-head", folder)
    wide = tmp_path_factory.mktemp("qwen3")
    families.save_family("qwen3", wide)
    return {
        "one": dict(model=str(folder), dtype="float32"),
        "four": dict(model=str(wide), dtype="float32"),
    }


REQUESTS = [
    (prompt, dict(max_tokens=12, temperature=0.0, logprobs=2))
    for prompt in families.prompts((1, 200, 33, 500, 64), seed=4)
]


def first_logprobs(outputs):
    return [dict(output.completions[0].logprobs[0].top) for output in outputs]


@pytest.mark.parametrize("heads", ["one", "four"])
def test_the_engine_gives_the_same_tokens_on_every_layout(model, heads):
    csa = CSAConfig(degrees=(1, 4), spans=(48,), halo=16, tail=8, sinks=4)
    options = model[heads] | dict(csa=csa)
    expected = run_engine(options, REQUESTS)
    dense = run_engine(model[heads], REQUESTS)
    assert first_logprobs(expected) != first_logprobs(dense)  # the pattern is really applied
    for tp, sp in [(1, 2), (2, 2), (1, 3)]:
        outputs = run_engine(options, REQUESTS, tp=tp, sp=sp)
        for output, reference in zip(outputs, expected, strict=True):
            assert output.completions[0].token_ids == reference.completions[0].token_ids, (tp, sp)


def test_a_tail_as_long_as_the_prompt_is_exact(model):
    csa = CSAConfig(degrees=(1, 4), spans=(48,), tail=500)
    dense = run_engine(model["four"], REQUESTS)
    outputs = run_engine(model["four"] | dict(csa=csa), REQUESTS, sp=2)
    for output, reference in zip(outputs, dense, strict=True):
        assert output.completions[0].token_ids == reference.completions[0].token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(csa=CSAConfig(degrees=(1, 4), spans=(16, 32))), ["1,4", "1 spans", "16,32"]),
        (dict(csa=CSAConfig(degrees=(1, 2, 4))), ["1,2,4", "2 spans"]),
        (
            dict(csa=CSAConfig(degrees=(1, 4), spans=(16,)), transport="ulysses"),
            ["ulysses", "gather"],
        ),
        (dict(csa=CSAConfig(degrees=(1, 0), spans=(16,))), ["1,0"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, options, words):
    with pytest.raises(AssertionError) as error:
        run_engine(model["four"] | options, REQUESTS)
    for word in words:
        assert word in str(error.value)
