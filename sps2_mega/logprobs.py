"""Log-probabilities for clients: of one token, and of all tokens of a prompt.

Data only: `worker.sampling` computes them, `serving.responses` shows them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural log, before temperature) at one position, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens from position `first` on, each after all before it.

    The first token of a prompt has none, as nothing precedes it. Packed, since a prompt may have a
    million tokens: `own[i]` (float32) is that of token `first` + i; `top_ids` (int32) and `top`
    (float32) have `num_top` entries per token, most likely first.
    """

    first: int
    num_top: int
    own: array[float]
    top_ids: array[int]
    top: array[float]

    def __post_init__(self) -> None:
        assert self.first >= 1, "nothing comes before the first token"
        assert len(self.top_ids) == len(self.top) == self.num_top * len(self.own)

    def __len__(self) -> int:
        """Number of scored tokens."""
        return len(self.own)

    def entry(self, index: int, token_id: int) -> TokenLogprob:
        """Entry of the token at position `first` + index, which is `token_id`."""
        part = slice(index * self.num_top, (index + 1) * self.num_top)
        top = tuple(zip(self.top_ids[part], self.top[part], strict=True))
        return TokenLogprob(token_id, self.own[index], top)

    def followed_by(self, later: PromptLogprobs) -> PromptLogprobs:
        """Both in one; `later` begins where this one ends."""
        assert (later.first, later.num_top) == (self.first + len(self), self.num_top), (
            f"scores from {self.first} to {self.first + len(self)} are not followed by "
            f"{later.first}"
        )
        return PromptLogprobs(
            first=self.first,
            num_top=self.num_top,
            own=self.own + later.own,
            top_ids=self.top_ids + later.top_ids,
            top=self.top + later.top,
        )
