"""Seconds of attention of one chunk where every layer is prefilled by chunks (`attention.chunked`).

A layer fetches each key once: a chunk brings its own, the first one also those that were cached.
Meanwhile the chunk attends to the keys that are on every rank already. Under CSA all keys travel,
and the visible ones are computed.
"""

from __future__ import annotations

from sps2_mega.attention.planner.overlap import LayerSeconds, exchanges_s
from sps2_mega.simulator.compute import attention_s
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.prompt import Prompt
from sps2_mega.simulator.sparse_cost import SparseCost
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
    """One layer of a chunk, of whose `chunk.end` keys the last `coming` have yet to travel.

    `gather` is the cost of that transport, `sparse` that of CSA, None for exact attention.
    """
    assert 0 < chunk.end - chunk.start <= coming <= chunk.end, f"{coming} keys come with {chunk}"
    new, here = chunk.num_new, chunk.end - coming
    share = 1.0 if sparse is None else sparse.visible_share(chunk, hardware)

    def attending_s(pairs: float, keys: int) -> float:
        kv_bytes = 2.0 * keys * gather.num_kv_heads * gather.head_dim * gather.itemsize
        own = share * pairs * gather.num_heads / gather.size
        return attention_s(own, gather.head_dim, kv_bytes, hardware) + hardware.call_s

    before_s = attending_s(float(new) * here, here) if here else 0.0
    own_s = attending_s(chunk.pairs - float(new) * here, coming)
    comm_s = 0.0
    if gather.size > 1:
        brought = coming / gather.size
        own_s += brought * gather.key_copy_s
        comm_s = max(brought * s for s in gather.key_s) + gather.messages.total_s
    compute_s = before_s + own_s
    total_s = exchanges_s(before_s, [comm_s], [own_s]) if pipelined else compute_s + comm_s
    return AttentionSeconds.of(
        "gather",
        LayerSeconds(total_s=total_s, compute_s=compute_s, comm_s=comm_s),
        merge_s=gather.merging_s(new / gather.size, 1 + bool(here), hardware),
    )
