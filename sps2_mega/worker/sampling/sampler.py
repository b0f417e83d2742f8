"""Choice of the next token from logits: one batched pass for sequences with different parameters.

Decides the order: forbidden tokens, penalties, temperature, top-k, top-p, min-p, choice. Each
filter works on what the previous one left. Reported log-probabilities are those of the model
itself: natural log of the softmax of the raw logits, before all of these.

The choice inverts the cumulative distribution, in token-id order and float64, at one random number
per token (`seeds.uniform`). So the text depends on the seed and the logits, not on the batch, rank
or device.

Shapes: B sequences, V entries of the true vocabulary, S of the B that are not greedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sps2_mega.kernels.host_to_device import to_device
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.types import SamplingParams
from sps2_mega.worker.sampling.penalties import PenaltyState, penalise
from sps2_mega.worker.sampling.seeds import derive_seed, uniform

__all__ = ["Drawn", "PenaltyState", "derive_seed", "draw", "sample", "uniform"]

_GREEDY_BELOW = 1e-5  # a temperature so low leaves one token in float32 anyway
_NUCLEUS = 1024  # most likely tokens that top-p considers before it sorts the vocabulary


def sample(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    histories: Sequence[PenaltyState | None] | None = None,
    banned: Sequence[Sequence[int]] | None = None,
) -> tuple[list[int | None], list[TokenLogprob | None]]:
    """Tokens and log-probabilities that `draw` chooses, on the host."""
    return draw(logits_BV, params, seeds, positions, histories, banned).tokens()


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities of some rows: of chosen tokens [L], and of the most likely ones [L, k]."""

    rows: list[tuple[int, int]]  # (row, number of most likely tokens requested)
    chosen_L: Tensor
    top_Lk: Tensor
    top_ids_Lk: Tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that the device is choosing, or has chosen.

    `chosen_3B` is float64, which holds token ids exactly: token ids, their rows' largest logits,
    and 1 unless a nucleus has more tokens than were considered. `again` then considers all; the
    logits must still exist.
    """

    chosen_3B: Tensor
    logprobs: _Logprobs | None
    again: Callable[[], Drawn]

    def tokens(self) -> tuple[list[int | None], list[TokenLogprob | None]]:
        """One token per row, and its log-probability where requested; waits for the device.

        The token of a row with NaN, or with nothing but infinities, is None: damaged weights or an
        overflow.
        """
        chosen, values, enough = self.chosen_3B.tolist()
        if not all(enough):
            return self.again().tokens()
        token_ids: list[int | None] = [int(token_id) for token_id in chosen]
        logprobs = _fetched(self.logprobs, token_ids)
        # max() propagates NaN, and is infinite only where no entry is finite or one overflowed.
        for row, value in enumerate(values):
            if not math.isfinite(value):
                token_ids[row] = logprobs[row] = None
        return token_ids, logprobs


def draw(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    histories: Sequence[PenaltyState | None] | None = None,
    banned: Sequence[Sequence[int]] | None = None,
    *,
    nucleus: int = _NUCLEUS,
) -> Drawn:
    """Choose one token per row, and its log-probability where requested; does not wait.

    Args:
        logits_BV: float32, not changed.
        params: of each row.
        seeds: of each row's sequence.
        positions: of each row's new token.
        histories: of each row; required where `params[i].has_penalties`.
        banned: token ids that a row cannot choose, as end-of-sequence tokens before `min_tokens`.
        nucleus: number of most likely tokens that top-p considers at first.
    """
    assert logits_BV.dtype is torch.float32, f"logits must be float32, got {logits_BV.dtype}"
    assert len(params) == len(seeds) == len(positions) == len(logits_BV), (
        "one entry per row of the logits"
    )
    again = partial(
        draw, logits_BV, params, seeds, positions, histories, banned, nucleus=logits_BV.shape[-1]
    )
    if not params:
        return Drawn(logits_BV.new_zeros(3, 0), None, again)
    logits = _adjusted(logits_BV, params, histories, banned)
    best, token_ids_B = logits.max(dim=-1)
    enough_B = torch.ones_like(best, dtype=torch.float64)
    rows = [i for i, p in enumerate(params) if p.temperature >= _GREEDY_BELOW]
    if rows:
        uniforms = [uniform(seeds[i], positions[i]) for i in rows]
        chosen_S, enough = _choose(logits, best, rows, params, uniforms, nucleus)
        if enough is not None:
            enough_B *= enough
        token_ids_B[to_device(rows, torch.int64, logits.device)] = chosen_S
    # One tensor, so that there is one to wait for.
    chosen_3B = torch.stack([token_ids_B.double(), best.double(), enough_B])
    return Drawn(chosen_3B, _logprobs(logits_BV, params, token_ids_B), again)


def _adjusted(
    logits_BV: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[PenaltyState | None] | None,
    banned: Sequence[Sequence[int]] | None,
) -> Tensor:
    """Logits with penalties and forbidden tokens; the given tensor itself when there are none."""
    rows = [i for i, p in enumerate(params) if p.has_penalties]
    pairs = [(i, token_id) for i, ids in enumerate(banned or ()) for token_id in ids]
    if not rows and not pairs:
        return logits_BV
    logits = logits_BV.clone()
    if rows:
        states = [histories[i] if histories is not None else None for i in rows]
        present = [state for state in states if state is not None]
        assert len(present) == len(rows), "a sequence with penalties needs its PenaltyState"
        index = to_device(rows, torch.int64, logits.device)
        logits[index] = penalise(logits[index], [params[i] for i in rows], present)
    if pairs:
        row_ids, token_ids = zip(*pairs, strict=True)
        places = tuple(to_device(ids, torch.int64, logits.device) for ids in (row_ids, token_ids))
        logits[places] = -math.inf
    return logits


def _choose(
    logits_BV: Tensor,
    best_B: Tensor,
    rows: list[int],
    params: Sequence[SamplingParams],
    uniforms: list[float],
    nucleus: int,
) -> tuple[Tensor, Tensor | None]:
    """Token ids [S] drawn for `rows`, and the nucleus check of `_filtered`."""
    device = logits_BV.device
    chosen_params = [params[i] for i in rows]
    if len(rows) < len(params):
        index = to_device(rows, torch.int64, device)
        logits_BV, best_B = logits_BV[index], best_B[index]
    temperature = to_device([p.temperature for p in chosen_params], torch.float32, device)
    # Weights relative to the most likely token, which has exactly 1: no overflow at any
    # temperature.
    weights_SV = ((logits_BV - best_B[:, None]) / temperature[:, None]).exp_()
    weights_SV, enough = _filtered(weights_SV, chosen_params, nucleus)
    cumulative_SV = weights_SV.cumsum(dim=-1, dtype=torch.float64)
    target_S = to_device(uniforms, torch.float64, device) * cumulative_SV[:, -1]
    # The first entry above the target. Uniform numbers end at 1 - 2**-53, so the product stays
    # below the total, and an entry of weight zero is never the first above anything. NaN rows are
    # reported later.
    ids_S = torch.searchsorted(cumulative_SV, target_S[:, None], right=True).squeeze(-1)
    return ids_S.clamp_(max=weights_SV.shape[-1] - 1), enough


def _filtered(
    weights_SV: Tensor, params: Sequence[SamplingParams], nucleus: int
) -> tuple[Tensor, Tensor | None]:
    """Weights with zeros where top-k, top-p or min-p exclude a token; equal weights share one fate.

    Second result: whether `nucleus` tokens reach every row's top-p, None where they surely do; if
    they do not, the weights are wrong.
    """
    enough = None
    vocab_size = weights_SV.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    if min(top_k) < vocab_size:
        weights_SV = _keep(weights_SV, _top_k_floor(weights_SV, top_k))
    if any(p.top_p < 1.0 for p in params):
        top_p = to_device([p.top_p for p in params], torch.float64, weights_SV.device)
        floor_S, enough = _top_p_floor(weights_SV, top_p, nucleus)
        weights_SV = _keep(weights_SV, floor_S)
    if any(p.min_p > 0.0 for p in params):
        # The largest weight is 1, so min_p is a floor as it stands.
        floor_S = to_device([p.min_p for p in params], torch.float32, weights_SV.device)
        weights_SV = _keep(weights_SV, floor_S)
    return weights_SV, enough


def _keep(weights_SV: Tensor, floor_S: Tensor) -> Tensor:
    return torch.where(weights_SV >= floor_S[:, None], weights_SV, 0.0)


def _top_k_floor(weights_SV: Tensor, top_k: list[int]) -> Tensor:
    """k-th largest weight of each row [S]; 0 where k is the whole vocabulary."""
    vocab_size = weights_SV.shape[-1]
    limits = [k if k < vocab_size else 0 for k in top_k]
    largest = weights_SV.topk(max(limits)).values
    last = to_device([max(k, 1) - 1 for k in limits], torch.int64, weights_SV.device)
    floor_S = largest.gather(-1, last[:, None]).squeeze(-1)
    return torch.where(to_device(limits, torch.int64, weights_SV.device) > 0, floor_S, 0.0)


def _top_p_floor(weights_SV: Tensor, top_p_S: Tensor, nucleus: int) -> tuple[Tensor, Tensor | None]:
    """Smallest weight of the nucleus [S], the most likely tokens that reach top_p of what is left.

    The boolean, None where `nucleus` covers the vocabulary: whether all rows reach it within
    `nucleus` tokens.
    """
    wanted_S1 = (top_p_S * weights_SV.sum(dim=-1, dtype=torch.float64))[:, None]
    off_S = top_p_S >= 1.0
    num_tokens = min(nucleus, weights_SV.shape[-1])
    sorted_SK = weights_SV.topk(num_tokens).values
    cumulative_SK = sorted_SK.cumsum(dim=-1, dtype=torch.float64)
    enough = None
    if num_tokens < weights_SV.shape[-1]:
        enough = (off_S | (cumulative_SK[:, -1:] >= wanted_S1)[:, 0]).all()
        if _is_known_at_once(enough):
            if not bool(enough):
                return _top_p_floor(weights_SV, top_p_S, weights_SV.shape[-1])
            enough = None
    # A token belongs to the nucleus while those before it have not reached top_p; the first always
    # does.
    num_kept = ((cumulative_SK - sorted_SK) < wanted_S1).sum(dim=-1, keepdim=True).clamp_(min=1)
    floor_S = sorted_SK.gather(-1, num_kept - 1).squeeze(-1)
    return floor_S.masked_fill(off_S, 0.0), enough


def _is_known_at_once(x: Tensor) -> bool:
    """Whether a number can be read without waiting for all launched work."""
    return x.device.type == "cpu"


def _logprobs(
    logits_BV: Tensor, params: Sequence[SamplingParams], token_ids_B: Tensor
) -> _Logprobs | None:
    wanted = [(i, p.logprobs) for i, p in enumerate(params) if p.logprobs is not None]
    if not wanted:
        return None
    index = to_device([i for i, _ in wanted], torch.int64, logits_BV.device)
    logprobs_LV = logits_BV[index].log_softmax(dim=-1)
    chosen_L = logprobs_LV.gather(-1, token_ids_B[index][:, None]).squeeze(-1)
    most = min(max(k for _, k in wanted), logits_BV.shape[-1])
    return _Logprobs(wanted, chosen_L, *logprobs_LV.topk(most))


def _fetched(
    logprobs: _Logprobs | None, token_ids: Sequence[int | None]
) -> list[TokenLogprob | None]:
    results: list[TokenLogprob | None] = [None] * len(token_ids)
    if logprobs is None:
        return results
    chosen, values, top_ids = (
        part.tolist() for part in (logprobs.chosen_L, logprobs.top_Lk, logprobs.top_ids_Lk)
    )
    for at, (row, k) in enumerate(logprobs.rows):
        token_id = token_ids[row]
        assert token_id is not None
        top = tuple(zip(top_ids[at][:k], values[at][:k], strict=True))
        results[row] = TokenLogprob(token_id, chosen[at], top)
    return results
