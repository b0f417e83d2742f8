"""Seconds of one chunk's attention in a prefill that goes through every layer chunk by chunk
(`attention.chunked`).

A layer's keys come once: with a chunk its own, with the first one those that were cached too. While
they come, the chunk attends to the keys that are here already. Under CSA all keys come, and the
visible ones are computed. Decides nothing.
"""

from __future__ import annotations

from sps2_mega.attention.planner.overlap import works_s
from sps2_mega.simulator.compute import attention_s, causal_pairs
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.sparse_cost import Prompt, SparseCost
from sps2_mega.simulator.transport_cost import AttentionSeconds, TransportCost


def chunk_seconds(
    gather: TransportCost,
    sparse: SparseCost | None,
    chunk: Prompt,
    coming: int,
    hardware: Hardware,
    *,
    pipelined: bool,
) -> AttentionSeconds:
    """One layer of a chunk, of whose `chunk.end` keys the last `coming` are not here yet; `gather`
    is that transport's cost."""
    assert 0 < chunk.end - chunk.start <= coming <= chunk.end, f"{coming} keys come with {chunk}"
    new, here = chunk.end - chunk.start, chunk.end - coming
    pairs = causal_pairs(chunk.start, chunk.end)
    share = 1.0 if sparse is None else sparse.visible_share(chunk, hardware)

    def attending_s(pairs: float, keys: int) -> float:
        kv_bytes = 2.0 * keys * gather.num_kv_heads * gather.head_dim * gather.itemsize
        own = share * pairs * gather.num_heads / gather.size
        return attention_s(own, gather.head_dim, kv_bytes, hardware) + hardware.call_s

    before_s = attending_s(float(new) * here, here) if here else 0.0
    own_s = attending_s(pairs - float(new) * here, coming)
    comm_s = 0.0
    if gather.size > 1:
        brought = coming / gather.size
        own_s += brought * gather.key_copy_s
        comm_s = max(brought * s for s in gather.key_s) + gather.size * gather.latency_s
    compute_s = before_s + own_s
    total = works_s(before_s, [comm_s], [own_s]) if pipelined else compute_s + comm_s
    return AttentionSeconds(
        transport="gather",
        compute_s=compute_s,
        comm_s=comm_s,
        exposed_s=total - compute_s,
        merge_s=gather.merging_s(new / gather.size, 1 + bool(here), hardware),
    )
