"""StepPlan <-> bytes, for one broadcast: msgpack of nested lists, nothing executable.

Of a prompt that is computed in chunks, or behind a long cached prefix, only the tokens that the
step reads are sent.
"""

from __future__ import annotations

import dataclasses
from array import array

import msgpack

from sps2_mega.types import (
    DecodeItem,
    ForwardMode,
    LayerSlice,
    PrefillItem,
    SamplingParams,
    StepPlan,
)

NOT_SENT = -1  # in `PrefillItem.token_ids` of other ranks

_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def encode(plan: StepPlan) -> bytes:
    """Bytes of a plan. Token and block lists are 64-bit: a prompt of a million tokens is 8 MB."""
    reads = [_tokens_read(item) for item in plan.prefills]
    prefills = [
        (
            item.seq_id,
            _pack(item.token_ids[read.start : read.stop]),
            read.start,
            len(item.token_ids),
            item.num_prompt_tokens,
            _pack(item.block_ranks),
            _pack(item.block_ids),
            [getattr(item.params, name) for name in _PARAM_NAMES],
            item.seed,
            item.start,
            item.end,
            item.num_shared_tokens,
            item.spans,
        )
        for item, read in zip(plan.prefills, reads, strict=True)
    ]
    decodes = [(i.seq_id, i.token_id, i.position, i.new_block) for i in plan.decodes]
    layers = plan.layers and (
        plan.layers.pass_id,
        plan.layers.first,
        plan.layers.end,
        plan.layers.sampled,
        plan.layers.chunked,
        plan.layers.first_token,
        plan.layers.end_token,
    )
    return bytes(
        msgpack.packb(
            (plan.step, int(plan.mode), prefills, decodes, plan.released, layers, plan.dropped)
        )
    )


def decode(payload: bytes) -> StepPlan:
    """Plan from bytes; tokens that the step does not read are NOT_SENT."""
    step, mode, prefills, decodes, released, layers, dropped = msgpack.unpackb(
        payload, use_list=False
    )
    return StepPlan(
        step=step,
        mode=ForwardMode(mode),
        prefills=[
            PrefillItem(
                seq_id=seq_id,
                token_ids=_placed(_unpack(token_ids), first, num_tokens),
                num_prompt_tokens=num_prompt_tokens,
                block_ranks=_unpack(block_ranks),
                block_ids=_unpack(block_ids),
                params=SamplingParams(**dict(zip(_PARAM_NAMES, params, strict=True))),
                seed=seed,
                start=start,
                end=end,
                num_shared_tokens=num_shared_tokens,
                spans=spans,
            )
            for (
                seq_id,
                token_ids,
                first,
                num_tokens,
                num_prompt_tokens,
                block_ranks,
                block_ids,
                params,
                seed,
                start,
                end,
                num_shared_tokens,
                spans,
            ) in prefills
        ],
        decodes=[DecodeItem(*item) for item in decodes],
        released=list(released),
        layers=layers and LayerSlice(*layers),
        dropped=list(dropped),
    )


def _tokens_read(item: PrefillItem) -> range:
    """Positions whose tokens other ranks need.

    These are the computed tokens, the next one where it is scored, and all of them for penalties.
    """
    if item.samples and item.params.has_penalties:
        return range(len(item.token_ids))
    if item.params.prompt_logprobs is not None:
        return range(item.start, min(item.end + 1, len(item.token_ids)))
    return range(item.start, item.end)


def _placed(token_ids: list[int], first: int, num_tokens: int) -> list[int]:
    after = num_tokens - first - len(token_ids)
    return [NOT_SENT] * first + token_ids + [NOT_SENT] * after


def _pack(values: list[int]) -> bytes:
    return array("q", values).tobytes()


def _unpack(payload: bytes) -> list[int]:
    values = array("q")
    values.frombytes(payload)
    return values.tolist()
