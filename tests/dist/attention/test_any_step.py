"""Prefill by exchanges equals the definition of CSA.

Over any lengths, spans, degrees, heads, ranks, transports and cuts.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import RankThreads

from sps2_mega.attention.csa.pattern import CSAPattern, tail_starts
from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.levels import transport as hierarchical
from sps2_mega.attention.levels.exchanges import LEVEL_TRANSPORTS
from sps2_mega.attention.pipeline.executor import Pipeline
from sps2_mega.attention.pipeline.settings import PIPELINE_OFF, PipelineSettings
from sps2_mega.attention.transports.base import SoftmaxParams
from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.kernels.csa.reference import attend_csa

BLOCK, WIDTH, SCALE = 3, 8, 0.4
CPU = torch.device("cpu")


@st.composite
def patterns(draw):
    degrees = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    spans = draw(st.lists(st.integers(1, 25), min_size=len(degrees) - 1, max_size=len(degrees) - 1))
    block = draw(st.sampled_from([1, 1, 1, 2, 5]))
    if block > 1:
        degrees[0] = 1
    return CSAPattern(
        degrees=tuple(degrees),
        spans=tuple(sorted(spans)),
        sinks=draw(st.integers(0, 6)),
        halo=draw(st.integers(0, 12)),
        tail=draw(st.integers(0, 9)),
        sample_queries=draw(st.booleans()) if block == 1 else False,
        block=block,
    )


@st.composite
def steps(draw):
    """SP levels, transports, sequences (tokens, prompt, cached), their patterns and placement."""
    levels = draw(st.sampled_from([(1,), (2,), (3,), (4,), (2, 2), (3, 2), (2, 1, 2)]))
    names = st.sampled_from(LEVEL_TRANSPORTS)
    transports = draw(st.one_of(st.tuples(names), st.tuples(*[names] * len(levels))))
    size = torch.tensor(levels).prod().item()
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.integers(1, 47))
        prompt = draw(st.sampled_from([tokens, max(1, tokens - 4)]))
        start = draw(st.sampled_from([0, 0, tokens // 2, tokens - 1]))
        ranks = [draw(st.integers(0, size - 1)) for _ in range(-(-tokens // BLOCK))]
        ranks = sorted(ranks) if draw(st.booleans()) else ranks
        sequences.append((tokens, prompt, start, ranks, draw(patterns())))
    per_kv_head, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    first_head = draw(st.integers(0, 3))
    pipeline = draw(st.sampled_from([PIPELINE_OFF, PipelineSettings(mode="on", micro_batches=3)]))
    return (
        levels,
        transports,
        sequences,
        per_kv_head,
        range(first_head, first_head + kv_heads),
        pipeline,
    )


@settings(max_examples=150, deadline=None)
@given(steps(), st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), st.integers(0, 7))
def test_any_step_equals_the_definition(step, dtype, layer):
    levels, transports, sequences, per_kv_head, kv_heads, pipeline = step
    ends = [tokens for tokens, *_ in sequences]
    size = int(torch.tensor(levels).prod())
    layout = build_layout(
        [ranks for *_, ranks, _ in sequences],
        ends,
        starts=[start for _, _, start, *_ in sequences],
        block_size=BLOCK,
        sp_size=size,
    )
    all_patterns = [pattern for *_, pattern in sequences]
    prompt_lens = [prompt for _, prompt, *_ in sequences]
    generator = torch.Generator().manual_seed(sum(ends) + layer)
    q, k, v = (
        torch.randn(sum(ends), heads, WIDTH, generator=generator).to(dtype)
        for heads in (per_kv_head * len(kv_heads), len(kv_heads), len(kv_heads))
    )
    firsts = layout.keys.seq_starts()

    def index_of(tokens, rank):
        index = torch.zeros(tokens.counts[rank], dtype=torch.int64)
        for run in tokens.local_runs(rank):
            index[run.local] = torch.arange(run.start, run.end) + firsts[run.sequence]
        return index

    threads = RankThreads(size)

    def on_rank(group):
        transport = hierarchical.HierarchicalTransport(
            layout,
            all_patterns,
            prompt_lens,
            transports,
            levels,
            kv_heads=kv_heads,
            group=group,
            device=CPU,
            pipeline=Pipeline(make_comm_streams(CPU), settings=pipeline),
        )
        queries, keys = (index_of(tokens, group.rank) for tokens in (layout.queries, layout.keys))
        return queries, transport.attend(layer, q[queries], k[keys], v[keys], SoftmaxParams(SCALE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hierarchical, "post_all_to_all", threads.post_all_to_all)
        results = threads.run(on_rank)
    out = torch.full_like(q, float("nan"))
    for queries, part in results:
        out[queries] = part
    tails = tail_starts(all_patterns, prompt_lens)
    for number, (tokens, _, start, _, pattern) in enumerate(sequences):
        rows = slice(firsts[number], firsts[number] + tokens)
        wanted, _ = attend_csa(
            q[rows].float(),
            k[rows].float(),
            v[rows].float(),
            scale=SCALE,
            degrees=pattern.degrees,
            spans=pattern.spans,
            sinks=pattern.sinks,
            halo=pattern.halo,
            exact_from=tails[number],
            sample_queries=pattern.sample_queries,
            block=pattern.block,
            layer=layer,
            first_kv_head=kv_heads.start,
        )
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(
            out[rows][start:].float(), wanted[start:], rtol=tolerance, atol=tolerance
        )
