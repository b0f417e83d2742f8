"""Memory of each rank by use once the model is loaded, as data and as a table. Pure.

                 least        most
weights 3.75 GiB 3.75 GiB KV cache 52.10 GiB 52.10 GiB = 65,536 tokens on each SP rank activations
1.20 GiB 1.20 GiB free 8.90 GiB 9.70 GiB least on rank 3
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

_LABELS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "free": "free",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank, by use.

    `activations` is an upper estimate of what the largest step needs; `free` is what then remains,
    below zero where a configured KV cache leaves too little.
    """

    weights: int
    kv_cache: int
    activations: int
    free: int

    def encode(self) -> str:
        """JSON, for the rendezvous store."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> RankMemory:
        return cls(**json.loads(text))


def memory_table(
    ranks: Sequence[RankMemory], *, cache_tokens_per_rank: int, pool: str | None = None
) -> str:
    """Table with one line per use: the least and the most that any of `ranks` has for it.

    `pool` names the ranks whose cache holds `cache_tokens_per_rank`, where ranks differ.
    """
    rows = [("", "least", "most", "")]
    for name, label in _LABELS.items():
        values = [getattr(rank, name) for rank in ranks]
        note = ""
        if name == "kv_cache":
            note = f"= {cache_tokens_per_rank:,} tokens on each {f'{pool} ' if pool else ''}SP rank"
        elif name == "free" and len(set(values)) > 1:
            note = f"least on rank {values.index(min(values))}"
        rows.append((label, _size(min(values)), _size(max(values)), note))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{label:<{widths[0]}}  {least:>{widths[1]}}  {most:>{widths[2]}}  {note}".rstrip()
        for label, least, most, note in rows
    ]
    where = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
    return "\n".join([f"memory of {where}:", *("  " + line for line in lines)])


def shortage(ranks: Sequence[RankMemory]) -> str | None:
    """Warning where the largest step may not find its memory on some rank, else None."""
    worst = min(range(len(ranks)), key=lambda rank: ranks[rank].free)
    if ranks[worst].free >= 0:
        return None
    return (
        f"rank {worst} may run out of memory: the KV cache and the largest step need up to "
        f"{_size(-ranks[worst].free)} more than is free; lower num_gpu_blocks_override or "
        "max_model_len, or use more ranks"
    )


def _size(num_bytes: int) -> str:
    """Size in GiB from a tenth of one up, else in MiB."""
    if abs(num_bytes) >= 2**30 / 10:
        return f"{num_bytes / 2**30:,.2f} GiB"
    return f"{num_bytes / 2**20:,.2f} MiB"
