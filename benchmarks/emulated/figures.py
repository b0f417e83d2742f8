"""Figures from samples of the emulated cluster: medians, balanced link rate, hidden communication.

    rate at balance    communication of unpipelined dense Ulysses = its computation
                       (time to first token less the waits)
    could be hidden    communication without its ends, at most the attention that can hide it:

        [K V Q0][Q1][..]                 ends: inputs of the first micro-batch, output of the last
                [ 0 ][ 1 ][ .. ]         hidden = communication unpipelined - waits pipelined,
                     [O0][..][On]                 at the same rate

Pure numbers: no process, no tensor.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.attention.pipeline.parts import cut_queries
from sps2_mega.kv_cache.placement import prompt_block_ranks

_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Times of one prompt, in seconds.

    `tbt_s` is the median gap between its tokens, 0 for a single token. `attention_s` is the
    computation of all layers' attention; `head_groups` times `query_parts` are the micro-batches of
    a layer. They are zero where nothing was recorded.
    """

    ttft_s: float
    tbt_s: float = 0.0
    exposed_comm_s: float = 0.0
    total_comm_s: float = 0.0
    attention_s: float = 0.0
    head_groups: int = 0
    query_parts: int = 0


def stages_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of a Sample that a trace's stages give: attention seconds, and the cut of a layer."""
    attention_s, micro_batches, groups = 0.0, set(), set()
    for event in events:
        number = event.get("args", {}).get("micro_batch")
        if event.get("cat") == "compute":
            attention_s += event["dur"] / 1e6
            micro_batches.add(number)
        elif event.get("cat") == "gather" and event["name"].split()[0] == "k":
            groups.add(number)
    head_groups = max(1, len(groups)) if micro_batches else 0
    return {
        "attention_s": attention_s,
        "head_groups": head_groups,
        "query_parts": len(micro_batches) // head_groups if head_groups else 0,
    }


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians, and the range of the time to the first token."""
    middle = {
        name: statistics.median(getattr(sample, name) for sample in samples)
        for name in ("ttft_s", "tbt_s", "exposed_comm_s", "total_comm_s", "attention_s")
    }
    last = samples[-1]
    found: dict[str, Any] = {
        "ttft_s": middle["ttft_s"],
        "ttft_range_s": [min(s.ttft_s for s in samples), max(s.ttft_s for s in samples)],
    }
    tbt_s = middle.pop("tbt_s")
    if tbt_s:
        found["tbt_s"] = tbt_s
        found["tbt_range_s"] = [min(s.tbt_s for s in samples), max(s.tbt_s for s in samples)]
    if middle["total_comm_s"]:
        found |= middle
        found["overlap"] = max(0.0, 1.0 - middle["exposed_comm_s"] / middle["total_comm_s"])
        found["micro_batches"] = [last.head_groups, last.query_parts]
    return found


def balanced_rate(samples: Mapping[float, Sample]) -> float | None:
    """Link rate at which unpipelined dense Ulysses communicates as long as it computes.

    `samples` are by rate; between two rates the logarithms are interpolated linearly. None if the
    rate lies outside of those measured.
    """
    ratios = {rate: communication_share(sample) for rate, sample in samples.items()}
    # From the slow end: on a busy machine ranks wait for each other at any rate, and fast links
    # show nothing else.
    for slow, fast in itertools.pairwise(sorted(ratios)):
        low, high = ratios[fast], ratios[slow]
        if 0 < low <= 1.0 <= high:
            part = math.log(1 / low) / math.log(high / low) if high > low else 0.0
            return fast * (slow / fast) ** part
    return None


def communication_share(sample: Sample) -> float:
    """Communication over everything else of an unpipelined prefill."""
    return sample.total_comm_s / (sample.ttft_s - sample.exposed_comm_s)


def end_share(
    sample: Sample, *, num_heads: int, num_kv_heads: int, ranks: int, tokens: int
) -> float:
    """Share of dense Ulysses' bytes that nothing can hide.

    These are the inputs of the first micro-batch and the output of the last one.
    """
    blocks = -(-tokens // _BLOCK)
    block_ranks = prompt_block_ranks(blocks, [blocks] * ranks, "contiguous")
    layout = build_layout([block_ranks], [tokens], block_size=_BLOCK, sp_size=ranks)
    parts = cut_queries(layout.queries, sample.query_parts)
    first, last = (sum(part.counts) / tokens for part in (parts[0], parts[-1]))
    keys = 2 * max(num_kv_heads, ranks)
    ends = (keys + num_heads * first + num_heads * last) / sample.head_groups
    return ends / (keys + 2 * num_heads)


def hidden_of_hideable(plain: Sample, pipelined: Sample, share_of_ends: float) -> float:
    """Share of the hideable communication that was hidden; both samples at the same link rate."""
    could = min(plain.total_comm_s * (1.0 - share_of_ends), plain.attention_s)
    return (plain.total_comm_s - pipelined.exposed_comm_s) / could


def paired(numerators: Sequence[Sample], denominators: Sequence[Sample]) -> float:
    """Median ratio of times to first token within a repeat, where disturbances hit both."""
    return statistics.median(
        top.ttft_s / bottom.ttft_s for top, bottom in zip(numerators, denominators, strict=True)
    )


def middle_of(samples: Sequence[Sample]) -> Sample:
    """A Sample of medians."""
    values = {
        name: statistics.median(getattr(sample, name) for sample in samples)
        for name in ("ttft_s", "exposed_comm_s", "total_comm_s", "attention_s")
    }
    last = samples[-1]
    return Sample(**values, head_groups=last.head_groups, query_parts=last.query_parts)
