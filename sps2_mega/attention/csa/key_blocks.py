"""Far keys kept or dropped by blocks of neighbours, and pieces of work with them.

A stride of blocks is no view of a tensor, so these keys are gathered into a buffer first
(`levels.key_segments`), in which kernels find them as neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sps2_mega.kernels.csa.piece import Piece


@dataclass(frozen=True, slots=True)
class KeyBlocks:
    """Keys kept in blocks: positions j with (j // block) % degree == residue.

    `first` and `stop` number them among all these positions.
    """

    first: int
    stop: int
    degree: int
    residue: int
    block: int

    def __len__(self) -> int:
        return self.stop - self.first

    def __iter__(self) -> Iterator[int]:
        return (position for part in self.ranges() for position in part)

    def ranges(self) -> list[range]:
        """Return the positions, a range for each block."""
        found = []
        number = self.first
        while number < self.stop:
            group, offset = divmod(number, self.block)
            start = (group * self.degree + self.residue) * self.block + offset
            count = min(self.block - offset, self.stop - number)
            found.append(range(start, start + count))
            number += count
        return found


def key_blocks(keys: range, *, degree: int, residue: int, block: int) -> KeyBlocks:
    """Return the kept positions of `keys`, which are neighbours."""

    def kept_before(position: int) -> int:
        group, offset = divmod(position, degree * block)
        return group * block + min(max(offset - residue * block, 0), block)

    return KeyBlocks(kept_before(keys.start), kept_before(keys.stop), degree, residue, block)


def key_ranges(keys: range | KeyBlocks) -> list[range]:
    """Return keys as arithmetic progressions."""
    return [keys] if isinstance(keys, range) else keys.ranges()


@dataclass(frozen=True, slots=True)
class BlockPiece:
    """Rectangle of work like `Piece`, with keys in blocks."""

    queries: range
    keys: KeyBlocks
    kv_heads: range

    @property
    def causal(self) -> bool:
        return False

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs of one KV head."""
        return len(self.queries) * len(self.keys)


CSAPiece = Piece | BlockPiece
