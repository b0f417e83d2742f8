"""Computation and traffic of an attention setting: exact counts from the pattern, without weights.

    cells of the nearest span are ranks:   |  0  |  1  |  2  | .. |
    in every layer a cell's rank needs the visible keys of all cells before it

Decides how a setting's cost is stated beside its accuracy. Seconds are the planner's affair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.eval.settings import Setting
from sps2_mega.attention.csa.decode_keys import keys_before_own_cell, keys_of_own_cell, num_classes
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.planner.sparse_volume import flops_ratio, visible_keys
from sps2_mega.config import CSAConfig, ModelConfig

ITEMSIZE = 2  # bytes are stated for bfloat16, whatever the evaluation computes in
LSE_BYTES = 4
FAR_LENGTH = 131072  # the cost there is stated beside the accuracy measured at other lengths
# From this length on, blocks are counted as single keys, exact but for one block per cell.
_LONG = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Cost of a whole prompt, averaged over the model's first layers.

    Shares are relative to dense attention.

        flops         share of attention pairs computed
        keys_moved    share of the rows of K and V that ranks need from each other
        bytes_moved   the same in bytes, with the exact tail's queries and partials in it
        rank_bytes    bytes that a rank sends in one layer, on average over the ranks, in bfloat16
        decode_keys   share of the cached keys that the first generated token reads
    """

    flops: float
    keys_moved: float
    bytes_moved: float
    rank_bytes: float
    decode_keys: float


def cost(setting: Setting, length: int, model: ModelConfig, *, cell: int) -> Cost:
    """Exact counts for a prompt of `length` tokens.

    `cell` is the tokens of a rank under dense attention; other settings have their own nearest
    span.
    """
    csa = setting.csa
    span = cell if csa.exact or csa.spans is None else csa.spans[0]
    row_bytes = 2 * model.head_dim * ITEMSIZE
    num_ranks = max(1, -(-length // span))
    all_rows = model.num_kv_heads * sum(range(span, length, span))
    if csa.exact:
        return Cost(
            flops=1.0,
            keys_moved=1.0,
            bytes_moved=1.0,
            rank_bytes=all_rows * row_bytes / num_ranks,
            decode_keys=1.0,
        )
    pattern = _pattern(csa if length < _LONG else replace(csa, block=1))
    heads = range(model.num_kv_heads)
    layers = range(min(model.num_layers, 4))
    # The tail's queries go to the keys, so their cells need keys for the other queries only.
    cells = [
        range(start, min(start + span, length - csa.tail))
        for start in range(span, length - csa.tail, span)
    ]
    moved = sum(
        part.num_rows
        for layer in layers
        for cell_queries in cells
        for part in visible_keys(
            pattern,
            prompt_len=length,
            queries=cell_queries,
            keys=range(cell_queries.start),
            kv_heads=heads,
            layer=layer,
        )
    ) / len(layers)
    body_rows = len(heads) * sum(queries.start for queries in cells)
    moved_bytes = moved * row_bytes + _tail_bytes(csa.tail, length, span, model)
    ratios = [flops_ratio(pattern, prompt_len=length, kv_heads=heads, layer=i) for i in layers]
    return Cost(
        flops=sum(ratios) / len(ratios),
        keys_moved=moved / body_rows if body_rows else 0.0,
        bytes_moved=moved_bytes / (all_rows * row_bytes) if all_rows else 0.0,
        rank_bytes=moved_bytes / num_ranks,
        decode_keys=_decode_share(pattern, length) if setting.sparse_decode else 1.0,
    )


def second_turn_bytes(num_tokens: int, num_ranks: int, model: ModelConfig) -> float:
    """Mean bytes that a rank sends in one layer for `num_tokens` behind a context of any length.

    Queries go once to every other rank, partials return.
    """
    per_query = model.num_heads * (2 * model.head_dim * ITEMSIZE + LSE_BYTES)
    return num_tokens * per_query * (num_ranks - 1) / num_ranks


def _tail_bytes(tail: int, length: int, span: int, model: ModelConfig) -> float:
    """Bytes of all ranks: each tail query goes to every rank before its own, a partial returns."""
    per_pair = model.num_heads * (2 * model.head_dim * ITEMSIZE + LSE_BYTES)
    return sum(i // span for i in range(max(0, length - tail), length)) * float(per_pair)


def _decode_share(pattern: CSAPattern, position: int) -> float:
    """Mean over head classes of the share of keys 0..position visible to a token at `position`."""
    classes = range(num_classes(pattern.degrees))
    chosen = classes[:: max(1, len(classes) // 64)]  # `local` has as many classes as tokens
    seen = sum(
        len(part)
        for head_class in chosen
        for part in (
            *keys_before_own_cell(pattern, position, head_class),
            *keys_of_own_cell(pattern, position, head_class),
        )
    )
    return seen / (len(chosen) * (position + 1))


def _pattern(csa: CSAConfig) -> CSAPattern:
    assert csa.spans is not None, "settings of an evaluation have their own spans"
    return CSAPattern(
        degrees=csa.degrees,
        spans=csa.spans,
        sinks=csa.sinks,
        halo=csa.halo,
        tail=csa.tail,
        sample_queries=csa.sample_queries,
        block=csa.block,
    )
