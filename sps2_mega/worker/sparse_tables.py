"""Cache slots that each running sequence sees on this rank when it decodes under CSA.

The keys before a query's own cell stay the same until generation enters another cell of some level,
so their slots are kept; those of the own cell are listed anew for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sps2_mega.attention.csa.decode_keys import keys_before_own_cell, keys_of_own_cell, num_classes
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.attention.csa.spans import SparsePrefill
from sps2_mega.worker.local_tables import LocalTables


@dataclass(slots=True)
class _Row:
    """Pattern of a sequence; `before[c]` are class c's slots before the own cell, in `cells`."""

    pattern: CSAPattern
    cells: tuple[int, ...] = ()
    before: dict[int, np.ndarray] = field(default_factory=dict)


class SparseTables:
    """Follows the sequences of `tables`: each is added at its prefill, and removed at its end."""

    def __init__(self, tables: LocalTables, sparse: SparsePrefill, *, block_size: int) -> None:
        self._tables, self._sparse, self._block_size = tables, sparse, block_size
        self._rows: dict[int, _Row] = {}
        self.num_classes = num_classes(sparse.csa.level_degrees)

    def add(self, seq_id: int, pattern: CSAPattern) -> None:
        self._rows[seq_id] = _Row(pattern)

    def remove(self, seq_id: int) -> None:
        del self._rows[seq_id]

    def step(self, seq_ids: list[int], positions: list[int]) -> SparseStep:
        """Keys that the given sequences see with one new token each, already in the tables."""
        return SparseStep(self, seq_ids, positions)

    def local_blocks(self, seq_id: int) -> np.ndarray:
        return self._tables.block_map(seq_id)

    def before(self, seq_id: int, position: int, head_class: int, blocks: np.ndarray) -> np.ndarray:
        """Slots before the own cell of `position`."""
        row = self._rows[seq_id]
        # All levels: spans need not divide one another, so cells may end inside an inner one.
        cells = tuple(position // span for span in row.pattern.spans)
        if cells != row.cells:
            row.cells, row.before = cells, {}
        if head_class not in row.before:
            keys = keys_before_own_cell(row.pattern, position, head_class)
            row.before[head_class] = _slots(keys, blocks, self._block_size)
        return row.before[head_class]

    def own(self, seq_id: int, position: int, head_class: int, blocks: np.ndarray) -> np.ndarray:
        """Slots of the own cell of `position`."""
        keys = keys_of_own_cell(self._rows[seq_id].pattern, position, head_class)
        return _slots(keys, blocks, self._block_size)

    def layer_classes(self, layer: int) -> list[int]:
        """Class of each local KV head."""
        return [(head + layer) % self.num_classes for head in self._sparse.kv_heads]

    @property
    def nearest_degree(self) -> int:
        return self._sparse.csa.level_degrees[0]


class SparseStep:
    """One decode step: the slots of all its sequences, listed once per class that a layer needs."""

    def __init__(self, tables: SparseTables, seq_ids: list[int], positions: list[int]) -> None:
        self._tables = tables
        self._sequences = [
            (seq_id, position, tables.local_blocks(seq_id))
            for seq_id, position in zip(seq_ids, positions, strict=True)
        ]
        self._own: dict[int, list[np.ndarray]] = {}
        self._whole: dict[int, list[np.ndarray]] = {}
        self.num_classes = tables.num_classes

    def layer_slots(self, layer: int) -> list[list[np.ndarray]]:
        """[sequence][local KV head] -> slots on this rank; equal for layers `num_classes` apart."""
        classes = self._tables.layer_classes(layer)
        by_class = {head_class: self._class_slots(head_class) for head_class in set(classes)}
        return [
            [by_class[head_class][row] for head_class in classes]
            for row in range(len(self._sequences))
        ]

    def _class_slots(self, head_class: int) -> list[np.ndarray]:
        if head_class not in self._whole:
            near = head_class % self._tables.nearest_degree
            if near not in self._own:
                self._own[near] = [
                    self._tables.own(*row[:2], near, row[2]) for row in self._sequences
                ]
            self._whole[head_class] = [
                np.concatenate([self._tables.before(*row[:2], head_class, row[2]), own])
                for row, own in zip(self._sequences, self._own[near], strict=True)
            ]
        return self._whole[head_class]


def _slots(keys: list[range], blocks: np.ndarray, block_size: int) -> np.ndarray:
    """Slots of the positions on this rank; `blocks[i]` is the id of block i, or -1 elsewhere."""
    pieces = [np.arange(part.start, part.stop, part.step) for part in keys]
    if not pieces:
        return np.empty(0, dtype=np.int64)
    positions = np.concatenate(pieces)
    index = positions // block_size
    positions, index = positions[index < len(blocks)], index[index < len(blocks)]
    ids = blocks[index]
    return (ids * block_size + positions % block_size)[ids >= 0]
