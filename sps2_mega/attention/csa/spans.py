"""CSA pattern of a request: the configured one, with spans from the ranks where none are given.

`pattern` decides what is visible, `pieces` how it is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.csa.pattern import CSAPattern, topology_spans
from sps2_mega.config import CSAConfig
from sps2_mega.parallel.topology import group_sizes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsePrefill:
    """Settings of prefill by SP levels: sparse, or exact with a transport for each level.

    `sp_levels` are ring sizes, innermost first. `kv_heads` of this TP rank are numbered over all TP
    ranks, so that a pattern does not change with TP.
    """

    csa: CSAConfig
    sp_levels: tuple[int, ...]
    kv_heads: range
    block_size: int
    transports: tuple[str, ...] = ("gather",)

    def pattern(self, prompt_len: int) -> CSAPattern:
        """Return the pattern of a prompt; topology spans are whole blocks, as equal as possible.

        Raises:
            ConfigError: the numbers of degrees and of spans, or of SP levels, do not fit.
        """
        spans = self.csa.spans
        if self.csa.exact:
            spans = ()
        if spans is None:
            group_sizes = group_sizes_of(self.sp_levels)
            blocks = -(-prompt_len // self.block_size)
            shard_len = max(1, -(-blocks // group_sizes[-1])) * self.block_size
            spans = topology_spans(shard_len, group_sizes)
        return CSAPattern(
            degrees=(1,) if self.csa.exact else self.csa.level_degrees,
            spans=spans,
            sinks=self.csa.sinks,
            halo=self.csa.halo,
            tail=self.csa.tail,
            sample_queries=self.csa.sample_queries,
            block=self.csa.block,
        )


def local_kv_heads(num_kv_heads: int, *, tp_rank: int, tp: int) -> range:
    """Return the KV heads whose queries this TP rank computes.

    With fewer heads than ranks, that is one head shared with other ranks.
    """
    if num_kv_heads < tp:
        head = tp_rank * num_kv_heads // tp
        return range(head, head + 1)
    share = num_kv_heads // tp
    return range(tp_rank * share, (tp_rank + 1) * share)
