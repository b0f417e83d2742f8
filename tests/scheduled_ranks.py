"""Memory of all ranks while they execute plans, without tensors; used by tests of the scheduler."""

from __future__ import annotations

from sps2_mega.kv_cache.block_table import BlockTable


class Ranks:
    """What every rank remembers; executing a plan checks that it can be executed, and that every
    slot that is read holds the token of that position after the very tokens before it."""

    def __init__(self, block_size: int, num_blocks: int, sp_size: int, num_layers: int = 1) -> None:
        self.num_layers = num_layers
        self.block_size, self.num_blocks, self.sp_size = block_size, num_blocks, sp_size
        self.tables: dict[int, BlockTable] = {}
        self.tokens: dict[int, list[int]] = {}  # cached so far
        self.slots: dict[tuple[int, int, int], tuple[int, ...] | None] = {}
        self.num_shared: dict[int, int] = {}
        self.passes: dict[
            int, tuple[list, tuple[int, int]]
        ] = {}  # suspended: items, (next layer, next token)

    def execute(self, plan) -> None:
        for pass_id in plan.dropped:
            del self.passes[pass_id]
        for seq_id in plan.released:
            del self.tables[seq_id], self.tokens[seq_id]
        if plan.layers is not None and not plan.layers.begins:
            assert not plan.prefills and not plan.decodes
            self.go_on(plan)
            return
        assert plan.prefills or plan.decodes
        if plan.layers is not None:
            assert plan.prefills and not plan.decodes and not plan.sampled
            assert plan.layers.pass_id not in self.passes
            self.passes[plan.layers.pass_id] = plan.prefills, _end(plan.layers)
        written = []
        for item in plan.prefills:
            assert item.seq_id not in self.tables
            assert item.num_shared_tokens <= item.start < item.end <= len(item.token_ids)
            assert item.num_shared_tokens % self.block_size == 0
            table = BlockTable(self.block_size)
            table.extend(item.block_ranks, item.block_ids)
            assert table.capacity - self.block_size < len(item.token_ids) <= table.capacity
            assert all(0 <= r < self.sp_size for r in table.ranks)
            assert all(0 <= b < self.num_blocks for b in table.block_ids)
            if item.samples:
                self.tables[item.seq_id], self.tokens[item.seq_id] = table, list(item.token_ids)
                self.num_shared[item.seq_id] = item.num_shared_tokens
            written += self.write(table, item.token_ids, item.start, item.end)
        for item in plan.decodes:
            table, tokens = self.tables[item.seq_id], self.tokens[item.seq_id]
            assert item.position == len(tokens), "every position is fed exactly once, in order"
            if item.new_block is not None:
                table.append(*item.new_block)
            tokens.append(item.token_id)
            written += self.write(table, tokens, item.position, item.position + 1)
        assert len(written) == len(set(written)), "two sequences write to one slot"
        for item in plan.prefills:
            table = BlockTable(self.block_size)
            table.extend(item.block_ranks, item.block_ids)
            self.read(table, item.token_ids[: item.end])
        for item in plan.decodes:
            self.read(self.tables[item.seq_id], self.tokens[item.seq_id])

    def go_on(self, plan) -> None:
        """Further layers of a suspended pass write to the slots of the first ones, which nobody
        else may have touched, and read what was cached before them."""
        items, stands = self.passes.pop(plan.layers.pass_id)
        assert (plan.layers.first, plan.layers.first_token) == stands < _end(plan.layers)
        if plan.layers.chunked:
            (item,) = items
            assert all(
                item.start <= start < end <= item.end
                for _, start, end in plan.layers.chunks(item.start, item.end)
            )
        else:
            assert not plan.layers.first_token and not plan.layers.end_token
        for item in items:
            table = BlockTable(self.block_size)
            table.extend(item.block_ranks, item.block_ids)
            self.read(table, item.token_ids[: item.end])
        if plan.layers.end < self.num_layers:
            assert not plan.sampled
            self.passes[plan.layers.pass_id] = items, _end(plan.layers)
        else:
            assert plan.sampled == [item.seq_id for item in items if item.samples]

    def write(self, table, tokens, start, end):
        places = [place_of(table, position) for position in range(start, end)]
        for position, place in zip(range(start, end), places, strict=True):
            self.slots[place] = tuple(tokens[: position + 1])
        return places

    def read(self, table, tokens) -> None:
        for position in range(len(tokens)):
            assert self.slots[place_of(table, position)] == tuple(tokens[: position + 1])

    def fail(self, plan, seq_id) -> None:
        """NaN: nobody may use what the sequence wrote since its last finite logits."""
        first = dict(self.num_shared)
        first |= {item.seq_id: item.position for item in plan.decodes}
        for index in range(first[seq_id] // self.block_size, self.tables[seq_id].num_blocks):
            place = self.tables[seq_id].ranks[index], self.tables[seq_id].block_ids[index]
            for offset in range(self.block_size):
                self.slots[*place, offset] = None


def place_of(table: BlockTable, position: int) -> tuple[int, int, int]:
    """(SP rank, block id, offset in the block) of a token position."""
    index, offset = divmod(position, table.block_size)
    return table.ranks[index], table.block_ids[index], offset


def _end(layers) -> tuple[int, int]:
    return layers.end, layers.end_token
