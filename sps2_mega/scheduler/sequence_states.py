"""State of each sequence, waiting or running, and the moves between states.

    add -> waiting --admit--> running, prefilling --chunks--> running --end--> (held while ranks
              ^                                                  |              still write)
              '--------------------- preempt --------------------'

Decides nothing about which sequence moves when (`scheduler`) nor where blocks are (`kv_cache`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.kv_cache.placement import Spread
from sps2_mega.scheduler.prefix_sharing import Prefix, PrefixSharing, WorthWaiting
from sps2_mega.types import FinishReason, PrefillItem, Sequence


class SequenceStates:
    """A sequence is waiting, without blocks, or running, with blocks for all tokens but the last.

    `waiting` and `running` are by id and to be read only. `running` is in order of admission: the
    youngest is preempted first, and returns to the front of `waiting`.
    """

    def __init__(self, ledger: BlockLedger, sharing: PrefixSharing | None) -> None:
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}
        self._ledger, self._sharing = ledger, sharing
        self._prefilled: dict[int, int] = {}  # running, prompt not yet whole -> tokens cached
        self._num_shared: dict[int, int] = {}  # of the same sequences
        self._on_ranks: set[int] = set()  # known to ranks
        self._held: set[int] = set()  # later steps write to their blocks
        self._ended: set[int] = set()  # held ones that are over
        self._released: list[int] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self.waiting or seq_id in self.running

    def is_held(self, seq_id: int) -> bool:
        """Whether an id cannot be used again yet, although its sequence is over."""
        return seq_id in self._ended

    @property
    def prefilling(self) -> list[Sequence]:
        """Running sequences whose tokens are not all cached, or planned to be, oldest first."""
        return [self.running[seq_id] for seq_id in self._prefilled]

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences whose tokens but the last are cached or planned to be, oldest first."""
        return [s for seq_id, s in self.running.items() if seq_id not in self._prefilled]

    def is_prefilling(self, seq_id: int) -> bool:
        return seq_id in self._prefilled

    def num_uncached(self, sequence: Sequence) -> int:
        """Tokens of a prefilling sequence that no step has computed."""
        return sequence.num_tokens - self._prefilled[sequence.seq_id]

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence.seq_id] = sequence

    def has_room(self, max_running: int) -> bool:
        """Whether a waiting sequence may perhaps be admitted: there is a block for one more."""
        num_running = len(self.running)
        return num_running < max_running and self._ledger.num_free > num_running

    def newcomers(
        self,
        order: Iterable[Sequence],
        max_running: int,
        worth_waiting: WorthWaiting = lambda *_: True,
    ) -> Iterator[tuple[Sequence, Prefix]]:
        """Waiting sequences that may be admitted now, in `order`, each with its prefix.

        The caller admits each one before it takes the next, or stops.
        """
        for sequence in islice(order, max_running):
            if not self.has_room(max_running):
                return  # not worth looking for a prefix in every step
            prefix = Prefix((), None)
            if self._sharing is not None and sequence.needs_prompt_logprobs:
                prefix = self._sharing.nothing(sequence)  # cached keys give no log-probabilities
            elif self._sharing is not None:
                found = self._sharing.look_up(sequence, worth_waiting)
                if found is None:
                    continue  # it waits for its prefix; the next one may overtake it
                prefix = found
            yield sequence, prefix

    def admit(
        self, sequence: Sequence, prefix: Prefix, now: float, spread: Spread | None = None
    ) -> bool:
        """Let a waiting sequence run, if there is room for it."""
        # One free block per running sequence: without it the newcomer would soon be preempted.
        table = self._ledger.admit(
            sequence.seq_id,
            sequence.num_tokens,
            spare_blocks=len(self.running),
            prefix=prefix.blocks,
            spread=spread,
        )
        if table is None:
            return False
        del self.waiting[sequence.seq_id]
        self.running[sequence.seq_id] = sequence
        num_shared = len(prefix.blocks) * self._ledger.block_size
        self._prefilled[sequence.seq_id] = self._num_shared[sequence.seq_id] = num_shared
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
            sequence.num_cached_tokens = num_shared
        sequence.spans = prefix.spans
        if self._sharing is not None:
            self._sharing.begin(sequence, prefix)
        return True

    def next_chunk(self, sequence: Sequence, max_tokens: int) -> PrefillItem:
        """Next tokens of a prefilling sequence, for the step that is being planned."""
        start = self._prefilled[sequence.seq_id]
        end = min(sequence.num_tokens, start + max_tokens)
        table = self._ledger.table(sequence.seq_id)
        params = sequence.params
        if params.prompt_logprobs is not None and not sequence.needs_prompt_logprobs:
            params = params.replace(prompt_logprobs=None)  # it was preempted after it had them
        # Copies: the plan must not change when the sequence grows.
        item = PrefillItem(
            sequence.seq_id,
            sequence.tokens_from(0),
            len(sequence.prompt_token_ids),
            list(table.ranks),
            list(table.block_ids),
            params,
            sequence.seed,
            start=start,
            end=end,
            num_shared_tokens=self._num_shared[sequence.seq_id],
            spans=sequence.spans,
        )
        if item.samples:
            self._on_ranks.add(sequence.seq_id)  # ranks add it with its last chunk
        return item

    def computed(self, item: PrefillItem) -> None:
        """Record that the step that is being planned completes a chunk, in all layers."""
        if item.seq_id not in self.running:
            return
        if item.samples:
            del self._prefilled[item.seq_id], self._num_shared[item.seq_id]
        else:
            self._prefilled[item.seq_id] = item.end

    def hold(self, seq_ids: Iterable[int]) -> None:
        """Keep the blocks of these running sequences even after they end, for later steps."""
        self._held.update(seq_ids)

    def let_go(self, seq_ids: Iterable[int]) -> None:
        """Undo `hold`: sequences that ended meanwhile give their blocks back now."""
        for seq_id in seq_ids:
            self._held.discard(seq_id)
            if seq_id in self._ended:
                self._ended.remove(seq_id)
                self._give_back(seq_id)

    def cached(self, sequence: Sequence) -> None:
        """Publish the prefix of a running sequence, whose new token is not yet added."""
        if self._sharing is not None:
            self._sharing.cached(sequence)

    def preempt(self, seq_id: int) -> None:
        """Take all blocks from a running sequence that is not held; it waits before all others."""
        assert seq_id not in self._held, f"ranks still write to blocks of sequence {seq_id}"
        sequence = self._leave(seq_id)
        if self._sharing is not None:
            self._sharing.stopped(seq_id)
        sequence.num_preemptions += 1
        self.waiting[seq_id] = sequence
        self.waiting.move_to_end(seq_id, last=False)

    def end(self, seq_id: int, reason: FinishReason) -> None:
        """Drop a sequence in any state."""
        sequence = self.waiting.pop(seq_id, None)
        if sequence is None:
            sequence = self._leave(seq_id)
        if self._sharing is not None:
            self._sharing.ended(seq_id)
        sequence.finish_reason = reason

    def take_released(self) -> list[int]:
        """Sequences that gave their blocks back since the last call and that ranks know."""
        released, self._released = self._released, []
        return released

    def check_integrity(self) -> None:
        """Recount sequences and blocks.

        Raises:
            AssertionError: something was lost or is held twice.
        """
        self._ledger.check_integrity()
        states = [self.waiting.keys(), self.running.keys(), self._ended]
        known = set().union(*states)
        assert sum(map(len, states)) == len(known), "a sequence is in two states"
        with_blocks = len(self.running) + len(self._ended)
        assert self._ledger.num_sequences == with_blocks, "blocks without a running sequence"
        assert self._prefilled.keys() == self._num_shared.keys() <= self.running.keys()
        assert self._ended <= self._held <= self.running.keys() | self._ended
        assert self._on_ranks <= self.running.keys() | self._ended
        if self._sharing is not None:
            alive = self.waiting.keys() | self.running.keys()
            self._sharing.check_integrity(set(self.running), alive)
        for seq_id, sequence in self.running.items():
            # Between plan and commit the planned sequences have a block for the token being fed
            # already.
            spare = self._ledger.table(seq_id).capacity - (sequence.num_tokens - 1)
            assert 0 <= spare <= self._ledger.block_size, (
                f"sequence {seq_id} has {spare} unused token slots"
            )

    def _leave(self, seq_id: int) -> Sequence:
        """Remove a running sequence; blocks of a held one are freed when it is let go."""
        self._prefilled.pop(seq_id, None)
        self._num_shared.pop(seq_id, None)
        if seq_id in self._held:
            self._ended.add(seq_id)
        else:
            self._give_back(seq_id)
        return self.running.pop(seq_id)

    def _give_back(self, seq_id: int) -> None:
        self._ledger.release(seq_id)
        if seq_id in self._on_ranks:
            self._on_ranks.remove(seq_id)
            self._released.append(seq_id)
