"""Where each sequence stands, and the moves between: waiting, running with part of its prompt cached, running.

Decides nothing about which sequence moves when (`scheduler`) nor where blocks go (`kv_cache`).

    add -> waiting --admit--> running, prefilling --chunks--> running --end-->
              ^------------------- preempt -------------------'
"""

from __future__ import annotations

from collections import deque

from sps2_mega.engine.prefix_sharing import Prefix, PrefixSharing
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.types import FinishReason, PrefillItem, Sequence


class SequenceStates:
    """A sequence is either waiting, without blocks, or running, with blocks for all tokens but the last.

    `waiting` and `running` are to be read only. Both are in order of arrival, but for what waited for a prefix: the
    youngest is preempted first and comes back first.
    """

    def __init__(self, ledger: BlockLedger, sharing: PrefixSharing | None) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._ledger, self._sharing = ledger, sharing
        self._known: set[int] = set()  # ids of all that wait or run
        self._prefilled: dict[int, int] = {}  # running, prompt not yet whole -> tokens cached
        self._num_shared: dict[int, int] = {}  # of the same
        self._released: list[int] = []

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._known

    @property
    def prefilling(self) -> list[Sequence]:
        """Running sequences whose tokens are not all cached, or planned to be, oldest first."""
        return [self.running[seq_id] for seq_id in self._prefilled]

    def is_prefilling(self, seq_id: int) -> bool:
        return seq_id in self._prefilled

    def add(self, sequence: Sequence) -> None:
        self._known.add(sequence.seq_id)
        self.waiting.append(sequence)

    def look_up(self, sequence: Sequence) -> Prefix | None:
        """What a waiting sequence can begin with; None when it should wait for a prefix being computed."""
        return Prefix((), None) if self._sharing is None else self._sharing.look_up(sequence)

    def admit(self, index: int, prefix: Prefix, now: float) -> Sequence | None:
        """Let waiting sequence number `index` run, if there is room for it."""
        sequence = self.waiting[index]
        # One free block for each running sequence: without it the newcomer would soon be preempted.
        table = self._ledger.admit(
            sequence.seq_id,
            sequence.num_tokens,
            spare_blocks=len(self.running),
            prefix=prefix.blocks,
        )
        if table is None:
            return None
        del self.waiting[index]
        self.running[sequence.seq_id] = sequence
        num_shared = len(prefix.blocks) * self._ledger.block_size
        self._prefilled[sequence.seq_id] = self._num_shared[sequence.seq_id] = num_shared
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
            sequence.num_cached_tokens = num_shared
        sequence.spans = prefix.spans
        if self._sharing is not None:
            self._sharing.begin(sequence, prefix)
        return sequence

    def next_chunk(self, sequence: Sequence, max_tokens: int) -> PrefillItem:
        """The next tokens of a prefilling sequence, as the step that is being planned will compute them."""
        start = self._prefilled[sequence.seq_id]
        end = min(sequence.num_tokens, start + max_tokens)
        table = self._ledger.table(sequence.seq_id)
        # Copies: the plan must not change when the sequence grows.
        item = PrefillItem(
            sequence.seq_id,
            sequence.tokens_from(0),
            len(sequence.prompt_token_ids),
            list(table.ranks),
            list(table.block_ids),
            sequence.params,
            sequence.seed,
            start=start,
            end=end,
            num_shared_tokens=self._num_shared[sequence.seq_id],
            spans=sequence.spans,
        )
        if item.samples:
            del self._prefilled[sequence.seq_id], self._num_shared[sequence.seq_id]
        else:
            self._prefilled[sequence.seq_id] = end
        return item

    def cached(self, sequence: Sequence) -> None:
        """A step with all tokens of a running sequence gave it a token, which is not yet added."""
        if self._sharing is not None:
            self._sharing.cached(sequence)

    def preempt_youngest(self) -> int:
        """Take all blocks from the youngest running sequence, which waits again; returns its id."""
        seq_id, sequence = next(reversed(self.running.items()))
        self._release(seq_id)
        if self._sharing is not None:
            self._sharing.stopped(seq_id)
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        return seq_id

    def end(self, seq_id: int, reason: FinishReason) -> None:
        """Drop a sequence from whatever state it is in."""
        self._known.remove(seq_id)
        sequence = self.running.get(seq_id)
        if sequence is not None:
            self._release(seq_id)
        else:
            index = next(i for i, waiting in enumerate(self.waiting) if waiting.seq_id == seq_id)
            sequence = self.waiting[index]
            del self.waiting[index]
        if self._sharing is not None:
            self._sharing.ended(seq_id)
        sequence.finish_reason = reason

    def take_released(self) -> list[int]:
        """Sequences that gave their blocks back since the last call and that ranks know."""
        released, self._released = self._released, []
        return released

    def check_integrity(self) -> None:
        """Recount sequences and blocks. Raises AssertionError when something was lost or is held twice."""
        self._ledger.check_integrity()
        assert self._ledger.num_sequences == len(self.running), "blocks without a running sequence"
        known = [sequence.seq_id for sequence in self.waiting] + list(self.running)
        assert sorted(known) == sorted(self._known), "a sequence is lost or in two states"
        assert self._prefilled.keys() == self._num_shared.keys() <= self.running.keys()
        if self._sharing is not None:
            self._sharing.check_integrity(set(self.running), self._known)
        for seq_id, sequence in self.running.items():
            # Between plan and commit the planned sequences have a block for the token being fed already.
            spare = self._ledger.table(seq_id).capacity - (sequence.num_tokens - 1)
            assert 0 <= spare <= self._ledger.block_size, (
                f"sequence {seq_id} has {spare} unused token slots"
            )

    def _release(self, seq_id: int) -> None:
        del self.running[seq_id]
        self._ledger.release(seq_id)
        # Ranks hear of a sequence with the last chunk of its prompt only.
        if self._prefilled.pop(seq_id, None) is None:
            self._released.append(seq_id)
        self._num_shared.pop(seq_id, None)
