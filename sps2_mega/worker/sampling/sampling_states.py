"""Sampling state of running sequences, and the sampling of a step's rows with it.

Every rank keeps it for all sequences, since the rank that samples a sequence changes. `sampler`
chooses the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_mega.config import ModelConfig
from sps2_mega.types import DecodeItem, PrefillItem, SamplingParams
from sps2_mega.worker.sampling.penalties import PenaltyState
from sps2_mega.worker.sampling.sampler import Drawn, draw


@dataclass(slots=True)
class _State:
    params: SamplingParams
    seed: int
    num_prompt_tokens: int
    penalties: PenaltyState | None


class SamplingStates:
    """One state per sequence, from its prefill until it is forgotten."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._states: dict[int, _State] = {}

    def add(self, item: PrefillItem) -> None:
        penalties = None
        if item.params.has_penalties:
            penalties = PenaltyState(
                item.token_ids[: item.num_prompt_tokens],
                self._config.vocab_size,
                output_ids=item.token_ids[item.num_prompt_tokens :],
                device=self._device,
            )
        self._states[item.seq_id] = _State(
            item.params, item.seed, item.num_prompt_tokens, penalties
        )

    def forget(self, seq_id: int) -> None:
        del self._states[seq_id]

    def note_chosen(self, items: Iterable[DecodeItem]) -> None:
        """Record the tokens that enter with a decode step: they were chosen in the step before."""
        for item in items:
            penalties = self._states[item.seq_id].penalties
            if penalties is not None:
                penalties.append(item.token_id)

    def wanted_logprobs(self, seq_ids: Sequence[int]) -> list[int | None]:
        """Number of log-probabilities that each sequence requested."""
        return [self._states[seq_id].params.logprobs for seq_id in seq_ids]

    def draw(self, logits_RV: Tensor, seq_ids: Sequence[int], positions: Sequence[int]) -> Drawn:
        """Draw one token for each row of the logits, which belong to the given sequences.

        `positions[i]` is the position that the new token of row i will have.
        """
        states = [self._states[seq_id] for seq_id in seq_ids]
        return draw(
            logits_RV,
            [state.params for state in states],
            [state.seed for state in states],
            positions,
            [state.penalties for state in states],
            [self._banned(state, at) for state, at in zip(states, positions, strict=True)],
        )

    def _banned(self, state: _State, position: int) -> tuple[int, ...]:
        """Tokens that would end the sequence before `min_tokens`."""
        if position - state.num_prompt_tokens >= state.params.min_tokens:
            return ()
        return self._config.eos_token_ids + state.params.stop_token_ids
