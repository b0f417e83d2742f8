"""Log-probabilities of a given text at every position of a prefill, under an attention setting.

The prompt goes through the same input tensors, attention and model as a request's prefill does, and
is scored like one with prompt log-probabilities (`prompt_logprobs`); nothing is sampled. Every rank
calls with the same arguments and gets the same results. Decides nothing about texts or measures
(`benchmarks/eval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sps2_mega.attention.csa.spans import SparsePrefill, local_kv_heads
from sps2_mega.attention.planner.attention_choice import check_levels, choose_transport
from sps2_mega.config import CSAConfig
from sps2_mega.errors import RequestError
from sps2_mega.kv_cache.ledger import BlockLedger
from sps2_mega.parallel.groups import ParallelGroups
from sps2_mega.types import PrefillItem, SamplingParams
from sps2_mega.worker.batching import prefill_input
from sps2_mega.worker.executor import Executor
from sps2_mega.worker.local_tables import LocalTables
from sps2_mega.worker.sampling.prompt_logprobs import compute_prompt_logprobs, gather_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScore:
    """Scores of one prompt, on the CPU and in position order.

    `logprobs_T[i]` (float64, one less than there are tokens) is the natural log-probability of
    token i+1 after tokens 0..i; NaN where the model gave no finite logits. `rows_PV` (float32) are
    whole rows of log-probabilities, at the requested positions.
    """

    logprobs_T: Tensor
    rows_PV: Tensor


def executor_with(
    executor: Executor, csa: CSAConfig, *, transport: str = "auto", sparse_decode: bool = False
) -> Executor:
    """An executor on the same weights and cache under another attention setting.

    With `sparse_decode` generated tokens see what the pattern shows, else all keys.

    Raises:
        ConfigError: the setting cannot be had with this model, transport or number of SP levels.
    """
    chosen = choose_transport(transport, csa, executor.config)
    if csa.exact and "," not in chosen:
        return executor.with_attention(chosen, None)
    groups = executor.groups
    sparse = SparsePrefill(
        csa=csa,
        sp_levels=tuple(level.size for level in groups.sp_levels),
        kv_heads=local_kv_heads(
            executor.config.num_kv_heads, tp_rank=groups.tp.rank, tp=groups.tp.size
        ),
        block_size=executor.pool.block_size,
        transports=tuple(chosen.split(",")),
    )
    check_levels(sparse)
    return executor.with_attention(chosen, sparse, sparse_decode=sparse_decode)


@torch.inference_mode()
def score_prompt(
    executor: Executor,
    token_ids: list[int],
    *,
    row_positions: Sequence[int] = (),
    rows_at_once: int = 512,
) -> PromptScore:
    """Score one prompt on an idle executor: any block of its cache is overwritten.

    `row_positions` (ascending) are positions after which the whole distribution is wanted.
    `rows_at_once` bounds the logits that exist at a time, in tokens.

    Raises:
        RequestError: the prompt has less than two tokens or does not fit the cache, or a position
            is outside.
    """
    num_tokens = len(token_ids)
    if num_tokens < 2:
        raise RequestError(f"a prompt to score needs at least 2 tokens, got {num_tokens}")
    if any(not 0 <= position < num_tokens for position in row_positions):
        raise RequestError(f"row positions must be in [0, {num_tokens}), got {list(row_positions)}")
    item = _placed(executor, token_ids)
    groups, pool = executor.groups, executor.pool
    # Tables of its own: whatever this call places is forgotten with them.
    tables = LocalTables(rank=groups.sp.rank, block_size=pool.block_size)
    step = prefill_input([item], tables, pool, groups.sp, executor.prefill, device=executor.device)
    hidden = executor.model.hidden(step.tokens_T, step.positions_T, step.attention)
    scores = compute_prompt_logprobs(
        executor.model,
        hidden,
        [item],
        groups,
        block_size=pool.block_size,
        rows_at_once=rows_at_once,
    )[item.seq_id]
    positions = step.positions_T.cpu().numpy()
    wanted = np.flatnonzero(np.isin(positions, row_positions))
    rows = [torch.empty(0, executor.config.vocab_size)]
    for part in torch.from_numpy(wanted).split(rows_at_once):
        logits_RV = executor.model.logits(hidden.index_select(0, part.to(executor.device)))
        rows.append(torch.log_softmax(logits_RV, -1).cpu())
    return PromptScore(
        logprobs_T=torch.tensor(scores.own, dtype=torch.float64),
        rows_PV=_in_position_order(torch.cat(rows), positions[wanted], row_positions, groups),
    )


def _placed(executor: Executor, token_ids: list[int]) -> PrefillItem:
    """The prompt on blocks of an empty cache, in the transport's preferred placement."""
    pool, sp = executor.pool, executor.groups.sp
    balanced = executor.prefill.transport == "gather" and executor.prefill.sparse is None
    ledger = BlockLedger(
        num_blocks=pool.num_blocks,
        sp_size=sp.size,
        block_size=pool.block_size,
        layout="zigzag" if balanced else "contiguous",
    )
    table = ledger.admit(0, len(token_ids), spare_blocks=0)
    if table is None:
        room = ledger.num_blocks * pool.block_size
        raise RequestError(
            f"a prompt of {len(token_ids)} tokens does not fit the KV cache of {room} tokens"
        )
    return PrefillItem(
        seq_id=0,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        block_ranks=list(table.ranks),
        block_ids=list(table.block_ids),
        params=SamplingParams(prompt_logprobs=0),
        seed=0,
        start=0,
        end=len(token_ids),
    )


def _in_position_order(
    local: Tensor, local_positions: np.ndarray, positions: Sequence[int], groups: ParallelGroups
) -> Tensor:
    """Rows of all ranks, one per position of `positions` (ascending).

    `local` are the rows of `local_positions`.
    """
    if not positions:
        return local
    here = np.isin(np.asarray(positions, dtype=np.int64), local_positions)
    flags = torch.from_numpy(np.stack([here]).astype(np.uint8))
    held = gather_rows(flags, [1] * groups.sp.size, groups).numpy().astype(bool)
    gathered = gather_rows(local, held.sum(1).tolist(), groups)
    ordered = torch.empty_like(gathered)
    ordered[torch.from_numpy(np.nonzero(held)[1])] = gathered
    return ordered
