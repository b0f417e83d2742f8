"""Repetition, presence and frequency penalties, from a record of a sequence's tokens.

Decides the formulas: repetition counts prompt and output and scales a logit towards less likely;
presence and frequency count the output only and subtract, as in the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.kernels.host_to_device import to_device
from sps2_mega.types import SamplingParams


class PenaltyState:
    """Tokens that occurred in one sequence, and their counts in its output.

    Takes 5 bytes per vocabulary entry, so ranks keep one only for sequences whose
    `SamplingParams.has_penalties`. `output_ids` are the tokens that a preempted sequence had
    generated before.
    """

    __slots__ = ("output_counts", "seen")

    def __init__(
        self,
        prompt_ids: Sequence[int],
        vocab_size: int,
        *,
        output_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        outputs = torch.tensor(output_ids, dtype=torch.int64, device=device)
        self.output_counts = torch.bincount(outputs, minlength=vocab_size).float()  # [V]
        self.seen = self.output_counts > 0  # [V]
        self.seen[torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True

    def append(self, token_id: int) -> None:
        """Record one more output token."""
        self.output_counts[token_id] += 1.0
        self.seen[token_id] = True


def penalise(
    logits_BV: Tensor, params: Sequence[SamplingParams], states: Sequence[PenaltyState]
) -> Tensor:
    """New logits [B, V] with each row's penalties applied."""
    seen = torch.stack([state.seen for state in states])
    counts = torch.stack([state.output_counts for state in states])

    def column(values: list[float]) -> Tensor:
        return to_device(values, logits_BV.dtype, logits_BV.device)[:, None]

    factor = column([p.repetition_penalty for p in params])
    scaled = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
    logits = torch.where(seen, scaled, logits_BV)
    logits = logits - column([p.frequency_penalty for p in params]) * counts
    return logits - column([p.presence_penalty for p in params]) * (counts > 0)
