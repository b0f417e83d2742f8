"""Synthetic arrivals: a Poisson process with fixed lengths, or with the lengths of a trace."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival


def poisson(
    lengths: Sequence[tuple[int, int]], *, rate: float, count: int, seed: int
) -> list[Arrival]:
    """Draw `count` requests at `rate` per second, with (prompt, output) tokens from `lengths`.

    Raises:
        ConfigError: no lengths, or a rate that is not positive.
    """
    if not lengths or rate <= 0:
        raise ConfigError(f"needs lengths and a rate > 0, got {len(lengths)} and {rate}")
    source, time_s = random.Random(seed), 0.0
    arrivals = []
    for _ in range(count):
        time_s += source.expovariate(rate)
        prompt_len, output_len = source.choice(lengths)
        arrivals.append(Arrival(time_s=time_s, prompt_len=prompt_len, output_len=output_len))
    return arrivals
