"""Requests of a workload: arrival times, lengths, and the blocks that their prompts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sps2_mega.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request, `time_s` after the workload's start.

    `hash_ids[b]` names tokens [b * hash_block, ..) of the prompt and all before them: equal names
    are equal tokens. Empty: the prompt shares nothing.

    Raises:
        ConfigError: no tokens, or a time before the start.
    """

    time_s: float
    prompt_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    hash_block: int = 512

    def __post_init__(self) -> None:
        if self.prompt_len < 1 or self.output_len < 1 or self.time_s < 0:
            raise ConfigError(
                "a request needs a time >= 0 and at least one token in and out, got "
                f"{self.time_s} s, {self.prompt_len} in, {self.output_len} out"
            )

    def token_ids(self, unique: int) -> list[int]:
        """Tokens that are equal exactly where the trace says so.

        `unique` tells prompts without names apart.
        """
        if not self.hash_ids:
            return [_UNNAMED + unique] * self.prompt_len
        tokens: list[int] = []
        for name in self.hash_ids:
            tokens += [name] * self.hash_block
        return tokens[: self.prompt_len]


_UNNAMED = 2**30  # names of blocks in traces are far below
VOCAB_SIZE = 2**31


def scaled(arrivals: Sequence[Arrival], *, rate: float = 1.0, length: float = 1.0) -> list[Arrival]:
    """Speed requests up by `rate` and lengthen prompts by `length`.

    Prompts of another length share nothing.
    """
    if rate <= 0 or length <= 0:
        raise ConfigError(f"rate and length factors must be > 0, got {rate} and {length}")
    return [
        dataclasses.replace(
            arrival,
            time_s=arrival.time_s / rate,
            prompt_len=max(1, round(arrival.prompt_len * length)),
            hash_ids=arrival.hash_ids if length == 1.0 else (),
        )
        for arrival in arrivals
    ]
