"""The part of a sequence that one step prefills, as the cost terms see it."""

from __future__ import annotations

from dataclasses import dataclass

from sps2_mega.attention.layout.causal_pairs import causal_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Tokens [start, end) of one sequence are new, those before are cached."""

    start: int
    end: int

    @property
    def num_new(self) -> int:
        return self.end - self.start

    @property
    def pairs(self) -> int:
        """(query, key) pairs of its new tokens under exact attention, for one head."""
        return causal_pairs(range(self.start, self.end))
