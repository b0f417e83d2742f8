"""StepPlan <-> bytes, so that one broadcast carries it: msgpack of nested lists, nothing executable."""

from __future__ import annotations

import dataclasses
from array import array

import msgpack

from sps2_mega.types import DecodeItem, ForwardMode, PrefillItem, SamplingParams, StepPlan

_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


def encode(plan: StepPlan) -> bytes:
    """Token and block lists travel as 64-bit integers: a prompt of a million tokens is 8 MB."""
    prefills = [
        (
            item.seq_id,
            _pack(item.token_ids),
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
        for item in plan.prefills
    ]
    decodes = [(i.seq_id, i.token_id, i.position, i.new_block) for i in plan.decodes]
    return msgpack.packb((plan.step, int(plan.mode), prefills, decodes, plan.released))


def decode(payload: bytes) -> StepPlan:
    step, mode, prefills, decodes, released = msgpack.unpackb(payload, use_list=False)
    return StepPlan(
        step=step,
        mode=ForwardMode(mode),
        prefills=[
            PrefillItem(
                seq_id=seq_id,
                token_ids=_unpack(token_ids),
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
    )


def _pack(values: list[int]) -> bytes:
    return array("q", values).tobytes()


def _unpack(payload: bytes) -> list[int]:
    values = array("q")
    values.frombytes(payload)
    return values.tolist()
