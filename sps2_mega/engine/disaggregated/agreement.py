"""What the drivers of the two sides agree on before the first request."""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.engine.disaggregated.control import Control
from sps2_mega.engine.disaggregated.messages import Hello
from sps2_mega.engine.startup.start_rank import StartedRank
from sps2_mega.scheduler.admission import Limits


@dataclass(frozen=True, slots=True)
class Agreement:
    """`limits` of every sequence: it must fit either side, since a preempted one is prefilled
    again. `shares_prefixes`: both sides may use the blocks of common prefixes again.
    `num_blocks_there` are those of the other side."""

    limits: Limits
    shares_prefixes: bool
    num_blocks_there: int


def agree(rank: StartedRank, control: Control, other_driver: int, *, prefixes: bool) -> Agreement:
    """Both drivers call it with nothing else sent before. `prefixes`: whether this side can share
    them."""
    num_blocks = rank.num_blocks * rank.groups.sp.size
    prefixes = prefixes and not rank.config.cache.no_prefix_caching
    own = Hello(num_blocks * rank.config.cache.block_size, num_blocks, prefixes)
    control.send(other_driver, own)
    theirs = control.events.get().message
    assert isinstance(theirs, Hello), f"the first message was {theirs}"
    model = rank.resolved.config
    limits = Limits(
        max_model_len=rank.max_model_len,
        cache_tokens=min(own.cache_tokens, theirs.cache_tokens),
        vocab_size=model.vocab_size,
        eos_token_ids=frozenset(model.eos_token_ids),
    )
    return Agreement(limits, prefixes and theirs.shares_prefixes, theirs.num_blocks)
