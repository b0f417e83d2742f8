"""Number of cached tokens that one program of the decode kernel reads. Pure ints.

Short chunks fill the device when the batch is small, and spread one long row among short ones over
many programs. Each chunk costs a partial, so none is shorter than pays off.
"""

from __future__ import annotations

# Partials are float32: G rows of H written and read again, against chunk rows of
# K and of V in 16 bits. With G = 8 that is 1/64 of the traffic at the longest
# and a quarter of it at the shortest chunk.
SHORTEST_CHUNK = 128
LONGEST_CHUNK = 2048
_PROGRAMS_PER_PROCESSOR = 4


def chunk_len(*, num_rows: int, num_kv_heads: int, longest: int, num_processors: int) -> int:
    """Tokens of a chunk, for rows of at most `longest` cached tokens.

    A power of two between the bounds: the longest with which rows of that length
    give each multiprocessor a few programs.
    """
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors
    chunk = LONGEST_CHUNK
    while chunk > SHORTEST_CHUNK and num_rows * num_kv_heads * -(-longest // chunk) < wanted:
        chunk //= 2
    return chunk
