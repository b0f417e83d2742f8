"""Cached prefixes that sequences take over, and sequences that wait for a prefix being computed.

Decides when blocks become findable: after a step that gave their sequence a token, so never blocks
of a sequence that fails. `kv_cache` decides where blocks are and which are evicted. Pure Python;
digests of a prompt are made once, however often the sequence is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sps2_mega import types
from sps2_mega.kv_cache.block_chain import extend_chain
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.kv_cache.prefix_cache import CachedBlock, Spans

# (running sequence, start, end) -> whether to wait until it has computed the tokens [start, end),
# which another sequence needs too.
WorthWaiting = Callable[[types.Sequence, int, int], bool]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Start of a sequence: blocks to share (maybe none), and the CSA spans it uses."""

    blocks: Sequence[CachedBlock]
    spans: Spans


@dataclass(frozen=True, slots=True)
class _Filling:
    """A running sequence without a token yet: it computes the blocks that chain[first:] names."""

    sequence: types.Sequence
    first: int
    chain: Sequence[bytes]


class PrefixSharing:
    """Two sequences compute the same block at the same time only if waiting is not worth it."""

    def __init__(
        self,
        ledger: BlockLedger,
        *,
        root: bytes,
        topology_spans: Callable[[int], tuple[int, ...]] | None,
    ) -> None:
        """`root` stands for the attention settings (`block_chain.chain_root`). `topology_spans`
        gives the CSA spans of a prompt length where they follow from the topology; None: they are
        configured, or nothing is sparse."""
        self._ledger, self._root, self._topology_spans = ledger, root, topology_spans
        self._chains: dict[int, list[bytes]] = {}
        self._last_prompt: tuple[list[int], list[bytes]] | None = None
        self._filling: dict[int, _Filling] = {}
        self._filled_by: dict[bytes, int] = {}
        self._waits_for: dict[int, int] = {}

    def look_up(
        self, sequence: types.Sequence, worth_waiting: WorthWaiting = lambda *_: True
    ) -> Prefix | None:
        """Prefix that a waiting sequence can begin with; at least one token is left to compute.

        None when a running sequence is about to make more of it findable and that is worth waiting
        for.
        """
        if self._waits_for.get(sequence.seq_id) in self._filling:
            # Chunks of a long prompt take many steps; the answer is the same in all of them.
            return None
        chain = self._chain(sequence)
        usable = chain[: (sequence.num_tokens - 1) // self._ledger.block_size]
        own = self._own_spans(sequence)

        def accepts(spans: Spans) -> bool:
            # A preempted sequence continues with the spans it began with.
            return spans == own if sequence.num_preemptions else spans_fit(spans, own)

        blocks = self._ledger.find_prefix(usable, accepts)
        if len(blocks) < len(usable):
            filler = self._filling.get(self._filled_by.get(usable[len(blocks)], -1))
            if (
                filler is not None
                and accepts(filler.sequence.spans)
                and worth_waiting(filler.sequence, *self._shareable(usable, len(blocks), filler))
            ):
                self._waits_for[sequence.seq_id] = filler.sequence.seq_id
                return None
        return Prefix(blocks, blocks[0].spans if blocks else own)

    def nothing(self, sequence: types.Sequence) -> Prefix:
        """Empty prefix, whatever is cached: every token of the sequence must be computed."""
        return Prefix((), self._own_spans(sequence))

    def begin(self, sequence: types.Sequence, prefix: Prefix) -> None:
        """Record an admission with this prefix: others may wait for what the sequence fills."""
        self._waits_for.pop(sequence.seq_id, None)
        filling = _Filling(sequence, len(prefix.blocks), self._chain(sequence))
        self._filling[sequence.seq_id] = filling
        for digest in filling.chain[filling.first :]:
            self._filled_by.setdefault(digest, sequence.seq_id)

    def cached(self, sequence: types.Sequence) -> None:
        """Publish a running sequence's blocks: all its tokens are cached, and a step with them gave
        it a token, which is not yet added."""
        block_size = self._ledger.block_size
        if sequence.num_tokens % block_size and sequence.seq_id not in self._filling:
            return  # a decode step that filled no block
        self._stop_filling(sequence.seq_id)
        chain = self._chain(sequence)
        self._ledger.publish(sequence.seq_id, chain, sequence.spans)

    def stopped(self, seq_id: int) -> None:
        """Record that a sequence gave its blocks back; it may be admitted again."""
        self._stop_filling(seq_id)

    def ended(self, seq_id: int) -> None:
        """Forget a sequence that is over, whether it ran or not."""
        self._stop_filling(seq_id)
        self._waits_for.pop(seq_id, None)
        self._chains.pop(seq_id, None)

    def check_integrity(self, running: set[int], known: set[int]) -> None:
        """Check that nothing is remembered of sequences that are gone.

        Raises:
            AssertionError: something is.
        """
        assert self._filling.keys() <= running, "a sequence that does not run fills blocks"
        assert set(self._filled_by.values()) <= self._filling.keys(), (
            "a block to fill has no filler"
        )
        assert self._chains.keys() | self._waits_for.keys() <= known, "a sequence that is over"

    def _shareable(self, chain: Sequence[bytes], first: int, filler: _Filling) -> tuple[int, int]:
        """Token positions [start, end), from block `first` on, that a filler makes findable."""
        last = first
        for mine, theirs in zip(chain[first:], filler.chain[first:], strict=False):
            if mine != theirs:
                break
            last += 1
        return first * self._ledger.block_size, last * self._ledger.block_size

    def _own_spans(self, sequence: types.Sequence) -> Spans:
        if self._topology_spans is None or sequence.num_preemptions:
            return sequence.spans
        return self._topology_spans(len(sequence.prompt_token_ids))

    def _chain(self, sequence: types.Sequence) -> list[bytes]:
        """Digests of all full blocks of the sequence's tokens so far."""
        chain = self._chains.get(sequence.seq_id)
        if chain is None:
            chain = self._chains[sequence.seq_id] = self._prompt_chain(sequence.prompt_token_ids)
        block_size = self._ledger.block_size
        if len(chain) < sequence.num_tokens // block_size:
            tokens = sequence.tokens_from(len(chain) * block_size)
            extend_chain(chain, tokens, root=self._root, block_size=block_size)
        return chain

    def _prompt_chain(self, prompt: list[int]) -> list[bytes]:
        """Digests of a prompt, as a new list; samples of one request share a prompt's digests."""
        if self._last_prompt is None or self._last_prompt[0] is not prompt:
            chain: list[bytes] = []
            extend_chain(chain, prompt, root=self._root, block_size=self._ledger.block_size)
            self._last_prompt = prompt, chain
        return list(self._last_prompt[1])

    def _stop_filling(self, seq_id: int) -> None:
        filling = self._filling.pop(seq_id, None)
        if filling is None:
            return
        for digest in filling.chain[filling.first :]:
            if self._filled_by.get(digest) == seq_id:
                del self._filled_by[digest]


def spans_fit(recorded: Spans, own: Spans) -> bool:
    """Whether keys computed under CSA spans `recorded` serve a prompt with spans `own`.

    Recorded cells must be at least half as large; smaller ones would be a coarser approximation
    than the one configured.
    """
    if recorded is None or own is None:
        return recorded == own
    return all(2 * theirs >= mine for theirs, mine in zip(recorded, own, strict=True))
