"""Log-probabilities of prompt tokens, each after all before it, from a prefill step.

Input is the last norm's output. Of a row only its log-sum-exp, the logit of the token that follows
and the largest few logits leave the rank that has it; logits exist for a bounded number of rows at
a time, and each TP rank has its own part of the vocabulary.

    hidden rows --some at a time--> logits of this TP rank's tokens --> [lse, following, top k..]
    --TP--> packed rows
    packed rows of all SP ranks --> log-probabilities in the order of positions, on every rank

Which prompts are scored is in their params. Shapes: T scored rows, k the most top entries
requested, F = 2 + 2k.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.layout.token_layout import build_layout
from sps2_mega.comm.collectives import all_gather_last_dim, all_gather_rows
from sps2_mega.logprobs import PromptLogprobs
from sps2_mega.mcore.gpt import GPT
from sps2_mega.parallel.groups import Group, ParallelGroups
from sps2_mega.types import PrefillItem

# Bytes of float32 logits of one TP rank at a time; two or three tensors of this size exist at once.
_LOGITS_BYTES = 32 * 2**20


def compute_prompt_logprobs(
    model: GPT,
    hidden_T1C: Tensor,
    items: Sequence[PrefillItem],
    groups: ParallelGroups,
    *,
    block_size: int,
    rows_at_once: int | None = None,
) -> dict[int, PromptLogprobs]:
    """Log-probabilities by sequence, for items whose params request them.

    They are those of the prompt tokens that follow the computed ones, start+1 to end (or the
    prompt's last). Every rank calls with the same items and gets the same.

    Args:
        model: this rank's part.
        hidden_T1C: output of the last norm; its first rows are this rank's tokens of the items.
        items: prefills of the step.
        groups: of this rank.
        block_size: tokens per block.
        rows_at_once: bound of the rows whose logits exist at a time; None: as many as fit a fixed
            amount of memory.
    """
    counts = [item.params.prompt_logprobs for item in items]
    num_top = max((count for count in counts if count is not None), default=None)
    if num_top is None:
        return {}
    runs_by_rank = _scored_runs(items, block_size=block_size, sp_size=groups.sp.size)
    mine = runs_by_rank[groups.sp.rank]
    rows = np.concatenate([np.arange(0), *(run.rows for run in mine)]).astype(np.int64)
    following = [t for run in mine for t in items[run.item].token_ids[run.start + 1 : run.end + 1]]
    packed_TF = _packed_rows(
        model,
        hidden_T1C,
        torch.from_numpy(rows).to(hidden_T1C.device),
        torch.tensor(following, dtype=torch.int64, device=hidden_T1C.device),
        num_top=min(num_top, model.vocab_size),
        tp=groups.tp,
        rows_at_once=rows_at_once,
    )
    gathered = gather_rows(packed_TF, [_num_rows(runs) for runs in runs_by_rank], groups)
    return _by_sequence(gathered.numpy(), items, runs_by_rank)


def gather_rows(local: Tensor, counts: Sequence[int], groups: ParallelGroups) -> Tensor:
    """Rows of all SP ranks on the CPU, rank after rank; `counts[r]` are the rows of SP rank r.

    They travel over the world's CPU group, to which only the first rank of each TP group
    contributes, since its peers have the same rows.
    """
    tp = groups.tp
    each = [count if t == 0 else 0 for count in counts for t in range(tp.size)]
    return all_gather_rows(local if tp.rank == 0 else local[:0], each, groups.control)


@dataclass(frozen=True, slots=True)
class _ScoredRun:
    """Positions [start, end) of an item whose next tokens are scored, in its rank's rows `rows`."""

    item: int
    start: int
    end: int
    rows: range


def _scored_runs(
    items: Sequence[PrefillItem], *, block_size: int, sp_size: int
) -> list[list[_ScoredRun]]:
    """Runs of each SP rank, in the order of its rows."""
    layout = build_layout(
        [item.block_ranks for item in items],
        [item.end for item in items],
        starts=[item.start for item in items],
        block_size=block_size,
        sp_size=sp_size,
    ).queries
    by_rank: list[list[_ScoredRun]] = [[] for _ in range(sp_size)]
    for run in layout.runs:
        item = items[run.sequence]
        # No prompt token follows the last one.
        end = min(run.end, item.num_prompt_tokens - 1)
        if item.params.prompt_logprobs is not None and run.start < end:
            rows = range(run.local_start, run.local_start + end - run.start)
            by_rank[run.rank].append(_ScoredRun(run.sequence, run.start, end, rows))
    return by_rank


def _num_rows(runs: Sequence[_ScoredRun]) -> int:
    return sum(len(run.rows) for run in runs)


def _packed_rows(
    model: GPT,
    hidden_T1C: Tensor,
    rows_T: Tensor,
    following_T: Tensor,
    *,
    num_top: int,
    tp: Group,
    rows_at_once: int | None,
) -> Tensor:
    """[T, 1 + 2k] float64 on the CPU: log-probability of each row's following token, the largest k
    of all tokens, and their token ids."""
    if rows_at_once is None:
        rows_at_once = max(1, _LOGITS_BYTES // (4 * max(1, model.vocab_shard)))
    parts = [torch.empty(0, 1 + 2 * num_top, dtype=torch.float64)]
    for rows, following in zip(
        torch.split(rows_T, rows_at_once), torch.split(following_T, rows_at_once), strict=True
    ):
        logits_RV, first_id = model.shard_logits(hidden_T1C.index_select(0, rows))
        own_RF = _summary(logits_RV, first_id, following, num_top)
        all_RPF = all_gather_last_dim(own_RF, tp).reshape(len(rows), tp.size, own_RF.shape[1])
        # Waits for the device, which bounds the logits that exist; results are small, and needed on
        # the CPU anyway.
        parts.append(_merged(all_RPF, num_top).cpu())
    return torch.cat(parts)


def _summary(logits_RV: Tensor, first_id: int, following_R: Tensor, num_top: int) -> Tensor:
    """[R, F] float64 of the tokens from `first_id` on; float64 holds ids and float32 exactly.

    Columns are log-sum-exp, logit of the following token (-inf where another rank has it), top
    logits, and their ids.
    """
    num_rows, num_here = logits_RV.shape
    summary = logits_RV.new_full((num_rows, 2 + 2 * num_top), -math.inf, dtype=torch.float64)
    if num_here == 0:  # a small vocabulary ends before the last rank's part of the padded one
        return summary
    summary[:, 0] = logits_RV.logsumexp(-1)
    local_R = following_R - first_id
    is_here = (local_R >= 0) & (local_R < num_here)
    logit_R = logits_RV.gather(1, local_R.clamp(0, num_here - 1)[:, None])[:, 0]
    summary[:, 1] = torch.where(is_here, logit_R, -math.inf)
    count = min(num_top, num_here)
    top, ids = logits_RV.topk(count)
    summary[:, 2 : 2 + count] = top
    summary[:, 2 + num_top : 2 + num_top + count] = ids + first_id
    return summary


def _merged(all_RPF: Tensor, num_top: int) -> Tensor:
    """Summaries of all TP ranks as one row of `_packed_rows`. A token gets the same bits by itself
    and among the top ones."""
    lse_R1 = all_RPF[..., 0].logsumexp(-1, keepdim=True)
    own_R1 = all_RPF[..., 1].max(-1, keepdim=True).values
    top_RK, where_RK = all_RPF[..., 2 : 2 + num_top].flatten(1).topk(num_top)
    ids_RK = all_RPF[..., 2 + num_top :].flatten(1).gather(1, where_RK)
    return torch.cat([own_R1 - lse_R1, top_RK - lse_R1, ids_RK], -1)


def _by_sequence(
    packed: np.ndarray, items: Sequence[PrefillItem], runs_by_rank: Sequence[Sequence[_ScoredRun]]
) -> dict[int, PromptLogprobs]:
    """Log-probabilities of each scored item by position, from packed rows of all ranks."""
    num_top = (packed.shape[1] - 1) // 2
    at = 0
    pieces: dict[int, list[tuple[int, np.ndarray]]] = {}
    for run in _chain(runs_by_rank):
        pieces.setdefault(run.item, []).append((run.start, packed[at : at + len(run.rows)]))
        at += len(run.rows)
    found = {}
    for index, item in enumerate(items):
        wanted = item.params.prompt_logprobs
        if wanted is None:
            continue
        ordered = [rows for _, rows in sorted(pieces.get(index, ()), key=lambda piece: piece[0])]
        rows = np.concatenate([packed[:0], *ordered])
        count = min(wanted, num_top)
        found[item.seq_id] = PromptLogprobs(
            first=item.start + 1,
            num_top=count,
            own=array("f", rows[:, 0].astype(np.float32).tobytes()),
            top_ids=array("i", rows[:, 1 + num_top :][:, :count].astype(np.int32).tobytes()),
            top=array("f", rows[:, 1 : 1 + count].astype(np.float32).tobytes()),
        )
    return found


def _chain(runs_by_rank: Sequence[Sequence[_ScoredRun]]) -> Iterator[_ScoredRun]:
    for runs in runs_by_rank:
        yield from runs
