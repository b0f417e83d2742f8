"""Bytes and messages of each exact transport in one layer; bytes as a matrix, sender by receiver.

    S keys, T queries, P ranks, N query and K KV heads, H their width, e bytes per number;
    sent per rank:

    gather, ring   2 * S * K * H * e * (P-1)/P
    ulysses        (T/P * 2N + S/P * 2max(K, P)) * H * e * (P-1)/P
    pass_q         T * N * (2 * H * e + 4) * (P-1)/P

These are the sums for equal shares; the matrices follow the actual counts, padding included, and
equal the bytes that the communication layer counts (`Group.traffic`). A gather counts as a ring,
which is how both gloo and NCCL do it for large messages. Rows that CSA moves are counted by
`by_level`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.layout.heads import split_heads
from sps2_mega.attention.planner.step_shape import StepShape

Matrix = list[list[int]]

_LSE_BYTES = 4  # a float32 travels with each row of a partial


@dataclass(frozen=True, slots=True, kw_only=True)
class Messages:
    """Counts of the messages that carry keys with their values, queries, and results."""

    keys: int
    queries: int
    results: int


def bytes_moved(transport: str, shape: StepShape) -> Matrix:
    """`matrix[r][p]`: bytes that SP rank r sends to p in one layer of exact attention."""
    if shape.size == 1:
        return [[0]]
    if transport == "gather":
        return _gather(shape)
    if transport == "ring":
        return _ring(shape)
    if transport == "ulysses":
        return _ulysses(shape)
    assert transport == "pass_q", f"unknown transport {transport!r}"
    return _pass_q(shape)


def num_messages(transport: str, size: int) -> Messages:
    """Messages that follow one another in one layer."""
    if size == 1:
        return Messages(keys=0, queries=0, results=0)
    return {
        # K and V behind it, once round.
        "gather": Messages(keys=size, queries=0, results=0),
        # K and V together, once round.
        "ring": Messages(keys=size - 1, queries=0, results=0),
        # All peers at once, each time.
        "ulysses": Messages(keys=1, queries=1, results=1),
        # Queries once round, and the partials back to all peers at once.
        "pass_q": Messages(keys=0, queries=size - 1, results=1),
    }[transport]


def _kv_bytes(shape: StepShape) -> int:
    """Key and value of one token."""
    return 2 * shape.num_kv_heads * shape.head_dim * shape.itemsize


def _gather(shape: StepShape) -> Matrix:
    # Ragged shares travel padded to the longest.
    return _to_next(
        shape.size, [max(shape.keys) * (shape.size - 1) * _kv_bytes(shape)] * shape.size
    )


def _ring(shape: StepShape) -> Matrix:
    # A rank passes on every shard but the one that its next neighbour began with.
    total = sum(shape.keys)
    sent = [
        (total - shape.keys[(r + 1) % shape.size]) * _kv_bytes(shape) for r in range(shape.size)
    ]
    return _to_next(shape.size, sent)


def _to_next(size: int, sent: list[int]) -> Matrix:
    matrix = [[0] * size for _ in range(size)]
    for rank in range(size):
        matrix[rank][(rank + 1) % size] = sent[rank]
    return matrix


def _ulysses(shape: StepShape) -> Matrix:
    shares = split_heads(shape.num_heads, shape.num_kv_heads, shape.size)
    width = shape.head_dim * shape.itemsize
    matrix = [[0] * shape.size for _ in range(shape.size)]
    for sender, (own_heads, _) in enumerate(shares):
        for receiver, (heads, kv_heads) in enumerate(shares):
            if sender != receiver:
                dealt = shape.keys[sender] * 2 * len(kv_heads) + shape.queries[sender] * len(heads)
                returned = shape.queries[receiver] * len(own_heads)
                matrix[sender][receiver] = (dealt + returned) * width
    return matrix


def _pass_q(shape: StepShape) -> Matrix:
    row = shape.head_dim * shape.itemsize
    around = max(shape.queries) * (shape.size - 1) * shape.num_heads * row
    matrix = _to_next(shape.size, [around] * shape.size)
    for holder in range(shape.size):
        for owner in range(shape.size):
            if holder != owner:
                matrix[holder][owner] += shape.queries[owner] * shape.num_heads * (row + _LSE_BYTES)
    return matrix
