"""Sampling of a step on all ranks: each SP rank samples its own rows, then all get all tokens.

Every rank runs the same plan, so it knows which sequences each rank samples: no sizes travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_mega.comm.collectives import all_gather_rows
from sps2_mega.logprobs import TokenLogprob
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.types import StepOutput
from sps2_mega.worker.sampling.sampling_states import SamplingStates

_FAILED = -1.0  # on the wire, for a row without a token


def sample_step(
    states: SamplingStates,
    logits_RV: Tensor,
    items_by_rank: Sequence[Sequence[int]],
    seq_ids: Sequence[int],
    next_positions: Sequence[int],
    groups: ParallelGroups,
) -> StepOutput:
    """Sample this rank's rows of a step, and return the tokens of all ranks.

    `logits_RV` has a row for each entry of `items_by_rank[this SP rank]`; entries are indices of
    `seq_ids`, the step's sequences, and of `next_positions`, where their new tokens go.
    """
    mine = items_by_rank[groups.sp.rank]
    own = StepOutput(
        *states.draw(
            logits_RV,
            [seq_ids[index] for index in mine],
            [next_positions[index] for index in mine],
        ).tokens()
    )
    if groups.sp.size == 1:
        return own
    return exchange_tokens(own, items_by_rank, states.wanted_logprobs(seq_ids), groups)


def exchange_tokens(
    own: StepOutput,
    items_by_rank: Sequence[Sequence[int]],
    wanted: Sequence[int | None],
    groups: ParallelGroups,
) -> StepOutput:
    """Output of the whole step from this rank's own.

    `own` are the tokens of `items_by_rank[this SP rank]`, whose entries are indices of `wanted`:
    the number of log-probabilities that each sequence of the step requested.

    All-gathers rows [token, logprob, top ids.., top logprobs..]; float64 holds token ids exactly.
    They travel over the world's CPU group, to which only the first rank of each TP group
    contributes: sampled tokens are needed on the CPU, and TP peers sampled the same ones.
    """
    num_top = max((count for count in wanted if count is not None), default=0)
    with_logprobs = any(count is not None for count in wanted)
    width = 2 + 2 * num_top if with_logprobs else 1
    tp = groups.tp
    rows = torch.zeros(len(own.token_ids) if tp.rank == 0 else 0, width, dtype=torch.float64)
    for row, token_id, logprob in zip(rows, own.token_ids, own.logprobs, strict=False):
        row[0] = _FAILED if token_id is None else token_id
        if logprob is not None:
            row[1] = logprob.logprob
            count = len(logprob.top)
            row[2 : 2 + count] = torch.tensor([token for token, _ in logprob.top])
            row[2 + num_top : 2 + num_top + count] = torch.tensor(
                [value for _, value in logprob.top], dtype=torch.float64
            )
    counts = [len(items) if t == 0 else 0 for items in items_by_rank for t in range(tp.size)]
    gathered = all_gather_rows(rows, counts, groups.control).tolist()
    order = [index for items in items_by_rank for index in items]
    output = StepOutput([None] * len(wanted), [None] * len(wanted))
    for index, values in zip(order, gathered, strict=True):
        if values[0] == _FAILED:
            continue
        chosen = int(values[0])
        output.token_ids[index] = chosen
        num_wanted = wanted[index]
        if num_wanted is not None:
            top_ids, top_values = values[2 : 2 + num_wanted], values[2 + num_top :][:num_wanted]
            top = tuple(
                (int(token), value) for token, value in zip(top_ids, top_values, strict=True)
            )
            output.logprobs[index] = TokenLogprob(chosen, values[1], top)
    return output
