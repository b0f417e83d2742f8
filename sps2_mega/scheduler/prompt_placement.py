"""Spread of a prompt's blocks over SP ranks: whole on one, in stripes, or by the layout.

Pure rules on counts; the ledger keeps the blocks. Short prompts lie whole on one rank, so that
several run side by side and their prefill attention moves nothing; one that runs in chunks lies in
stripes, so that each chunk is on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sps2_mega import types
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.kv_cache.placement import Spread
from sps2_mega.scheduler.prefix_sharing import Prefix

LEAST_CHUNK = 64  # tokens on each rank: below it a layer is mostly overhead


@dataclass(frozen=True, slots=True)
class PromptPlacement:
    """Prompts below `threshold` tokens lie whole on one rank; 0: none by intention.

    Where there is one prompt for each rank, so do those below `crowd_threshold` that are no more
    than a rank's share of the FLOPs.
    """

    ledger: BlockLedger
    threshold: int
    crowd_threshold: int = 0

    @property
    def sp_size(self) -> int:
        return self.ledger.sp_size

    @property
    def least_chunk(self) -> int:
        """Tokens of the shortest chunk, in whole blocks on each rank."""
        blocks = -(-LEAST_CHUNK // self.ledger.block_size)
        return blocks * self.ledger.block_size * self.sp_size

    @property
    def unit(self) -> int:
        """Tokens of one block on each rank."""
        return self.ledger.block_size * self.sp_size

    def num_shared(self, prefix: Prefix) -> int:
        """Tokens of a prefix that is taken over."""
        return len(prefix.blocks) * self.ledger.block_size

    def longest_whole(self, num_tokens: Iterable[int], budget: int) -> int:
        """Length in tokens below which prompts lie whole on one rank.

        `num_tokens` are the lengths of the waiting prompts, the first of which make up a step of
        about `budget` tokens.
        """
        if self.sp_size == 1 or self.crowd_threshold <= self.threshold:
            return self.threshold
        count = total = 0
        for number in num_tokens:
            if count and total + number > budget:
                break
            count, total = count + 1, total + number
        if count < self.sp_size:
            return self.threshold
        return max(self.threshold, min(self.crowd_threshold, total // self.sp_size + 1))

    def spread(
        self,
        sequence: types.Sequence,
        prefix: Prefix,
        load: Sequence[int],
        *,
        chunks: Sequence[int] | None,
        longest_whole: int,
    ) -> Spread:
        """Spread of the tokens behind `prefix`.

        `load[r]` counts the tokens that the step has on SP rank r so far. `chunks` are the tokens
        of each chunk that the prompt may be cut into; None: it is not cut.
        """
        spread = self.ledger.spread
        if chunks is not None:
            return Spread("striped", tuple(-(-tokens // self.unit) for tokens in chunks))
        if self.sp_size == 1 or sequence.num_tokens >= longest_whole:
            return spread
        return replace(spread, rank=self._rank(sequence, prefix, load))

    def _rank(self, sequence: types.Sequence, prefix: Prefix, load: Sequence[int]) -> int | None:
        """Rank of the prefix, else the one with the least load, then the most room.

        None where the prefix is on several ranks, which then all take part anyway, or where no rank
        has room.
        """
        held = {block.sp_rank for block in prefix.blocks}
        needed = self.ledger.blocks_for(sequence.num_tokens) - len(prefix.blocks)
        free = self.ledger.free_per_rank
        candidates = held or range(self.sp_size)
        if len(held) > 1:
            return None
        roomy = [rank for rank in candidates if free[rank] >= needed]
        return min(roomy, key=lambda rank: (load[rank], -free[rank], rank), default=None)
