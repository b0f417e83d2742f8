"""Plan of one exchange on one rank: index tensors of what it sends, receives and computes.

    own rows --send--> other ranks                       rows needed there, each once
    own and received rows --gather--> buffer             compact keys: one row per d positions
    pieces of buffer rows --> partials --back--> owner   rows in the order they were sent

Made once per step. All ranks derive the same rows from the pattern, so no sizes are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.csa.key_blocks import CSAPiece
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.layout.token_layout import PrefillLayout, Run
from sps2_mega.attention.levels.demand import Demand, ExchangeDemand
from sps2_mega.attention.levels.exchanges import Exchange
from sps2_mega.attention.levels.key_segments import KeySegments
from sps2_mega.attention.levels.rows import (
    NO_ROWS,
    Finder,
    TokenPlaces,
    key_codes,
    query_codes,
    rows_of,
)
from sps2_mega.kernels.csa.piece import Piece


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Exchange of rows and the buffer [tokens, heads] made of it.

    `send` numbers own rows, rank by rank. `gather` numbers rows of (own, received), one for each
    row of the buffer; it is arbitrary for rows that nobody reads.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    gather: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BackPlan:
    """Way back of partials.

    `pick` numbers rows of the computed (token, head) buffer, rank by rank. `owned[r]` numbers this
    rank's (token, head) rows that rank r returns, itself included.
    """

    pick: Tensor
    counts: list[int]
    owned: list[Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """Pieces of some heads, numbered in the buffers, or among the local heads if nothing moved."""

    heads: slice
    kv_heads: slice
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """Rows that move and pieces to compute.

    `queries` and `back`, or `keys`, are None where they stay; pieces then number local tokens.
    Where an exchange's keys stay and `keys` is not None, the buffer is made of own rows alone and
    nothing travels.
    """

    queries: RowPlan | None
    keys: RowPlan | None
    back: BackPlan | None
    blocks: list[Block]


class ExchangePlans:
    """Plans of one step's exchanges on one SP rank, made when they are asked for.

    Args:
        layout: Placement of the step's queries and keys.
        patterns: CSA pattern of each sequence.
        tail_starts: Position of each sequence from which on queries see all keys.
        kv_heads: KV heads of this TP rank, numbered over all ranks.
        num_heads: Query heads of this TP rank.
        rank: SP rank that plans.
        device: Device of the indices.
    """

    def __init__(
        self,
        layout: PrefillLayout,
        patterns: Sequence[CSAPattern],
        tail_starts: Sequence[int],
        *,
        kv_heads: range,
        num_heads: int,
        rank: int,
        device: torch.device,
    ) -> None:
        self._demand = ExchangeDemand(layout, patterns, tail_starts, kv_heads)
        self._kv_heads, self._num_heads = kv_heads, num_heads
        self._rank, self._device = rank, device
        self._ranks = range(len(layout.keys.counts))
        self._key_places, self._query_places = TokenPlaces(layout.keys), TokenPlaces(layout.queries)
        self._num_keys, self._num_queries = layout.keys.counts[rank], layout.queries.counts[rank]

    def needs(self, exchange: Exchange) -> bool:
        """Tell whether any rank has queries for this exchange; all ranks agree."""
        return self._demand.needs(exchange)

    def plan(self, exchange: Exchange, layer: int) -> ExchangePlan:
        """Plan an exchange in `layer`; layers equal to it modulo every degree share the plan."""
        demands = list(self._demand.of_rank(exchange, self._rank, layer))
        own_heads = exchange.heads(self._rank)
        heads = _hull(part for part, _ in own_heads)
        kv_heads = _hull(part for _, part in own_heads)
        queries = back = keys = None
        query_row: Callable[[Run], int] = _first_local
        if not exchange.queries_stay:
            queries, back, query_row = self._move_queries(exchange, layer, demands, heads)
        segments = None
        if self._demand.brings_keys(exchange):
            segments = KeySegments(demands)
            keys = self._move_keys(exchange, layer, demands, kv_heads, segments)
        head_0, kv_0 = (heads.start if queries else 0), (kv_heads.start if keys else 0)
        blocks = []
        for part, kv_part in own_heads:
            pieces = [
                Piece(
                    _shift(piece.queries, query_row(one.run) - one.run.start),
                    segments.rows(one.run.sequence, piece.keys)
                    if segments
                    else _local_keys(piece, one.key_run),
                    piece.kv_heads,
                    piece.causal,
                )
                for one in demands
                if one.heads == part
                for piece in one.pieces
            ]
            if pieces:
                blocks.append(Block(_slice(part, head_0), _slice(kv_part, kv_0), pieces))
        return ExchangePlan(queries=queries, keys=keys, back=back, blocks=blocks)

    def _move_keys(
        self,
        exchange: Exchange,
        layer: int,
        demands: list[Demand],
        kv_heads: range,
        segments: KeySegments,
    ) -> RowPlan:
        me, width, places = self._rank, len(self._kv_heads), self._key_places
        send = [
            rows_of(
                key_codes(self._demand.of_rank(exchange, at, layer, holding=me), places, width),
                places,
                width,
            )
            if at != me
            else NO_ROWS
            for at in self._ranks
        ]
        needed = key_codes(demands, places, width)
        owners = places.rank[needed // width]
        received = [needed[owners == rank] if rank != me else NO_ROWS for rank in self._ranks]
        own = needed[owners == me]
        first = self._num_keys * width
        find = Finder(
            [own, *received],
            [rows_of(own, places, width), first + np.arange(len(needed) - len(own))],
        )
        codes = segments.codes(places, kv_heads, self._kv_heads, layer)
        return self._row_plan(send, received, find(codes), (segments.num_rows, len(kv_heads)))

    def _move_queries(
        self, exchange: Exchange, layer: int, demands: list[Demand], heads: range
    ) -> tuple[RowPlan, BackPlan, Callable[[Run], int]]:
        me, width, places = self._rank, self._num_heads, self._query_places
        sent = [
            query_codes(self._demand.of_rank(exchange, at, layer, asking=me), places, width)
            for at in self._ranks
        ]
        received = [
            query_codes((one for one in demands if one.run.rank == rank), places, width)
            for rank in self._ranks
        ]
        own = received[me]
        others = [codes if rank != me else NO_ROWS for rank, codes in enumerate(received)]
        first = self._num_queries * width
        find = Finder(
            [own, *others],
            [rows_of(own, places, width), first + np.arange(sum(map(len, others)))],
        )
        rows: dict[Run, int] = {}
        num_tokens, codes = 0, [NO_ROWS]
        for one in demands:
            if one.run not in rows:
                rows[one.run] = num_tokens
                num_tokens += one.run.num_tokens
                tokens = places.tokens(one.run.sequence, range(one.run.start, one.run.end))
                codes.append((tokens[:, None] * width + np.arange(heads.start, heads.stop)).ravel())
        buffer = np.concatenate(codes)
        owned = [rows_of(codes, places, width) for codes in sent]
        send = [numbers if rank != me else NO_ROWS for rank, numbers in enumerate(owned)]
        back = BackPlan(
            pick=self._tensor(Finder([buffer], [np.arange(len(buffer))])(np.concatenate(received))),
            counts=[len(codes) for codes in received],
            owned=[self._tensor(numbers) for numbers in owned],
        )
        plan = self._row_plan(send, others, find(buffer), (num_tokens, len(heads)))
        return plan, back, rows.__getitem__

    def _row_plan(
        self,
        send: list[np.ndarray],
        received: list[np.ndarray],
        gather: np.ndarray,
        shape: tuple[int, int],
    ) -> RowPlan:
        return RowPlan(
            send=self._tensor(np.concatenate(send)),
            send_counts=[len(rows) for rows in send],
            receive_counts=[len(codes) for codes in received],
            gather=self._tensor(gather),
            shape=shape,
        )

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


def _local_keys(piece: CSAPiece, run: Run) -> range:
    assert isinstance(piece.keys, range), "blocks of keys are brought together first"
    return _shift(piece.keys, run.local_start - run.start)


def _first_local(run: Run) -> int:
    return run.local_start


def _hull(parts: Iterator[range]) -> range:
    found = list(parts)
    return range(found[0].start, found[-1].stop) if found else range(0)


def _shift(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)


def _slice(numbers: range, first: int) -> slice:
    return slice(numbers.start - first, numbers.stop - first)
