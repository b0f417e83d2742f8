"""Messages between the drivers of the two pools: plain values <-> bytes, nothing executable.

    prefill driver                               decode driver
      Expect: a sequence will come       ->        queue it
                                         <-      Room: blocks for it are reserved
      (prefill; keys and values travel from all prefill ranks to all decode ranks)
      Start: its first token             ->        decode it, after Arrived of each decode rank
                                         <-      Tokens: of one step; after a preemption Room again
      Drop: it is no longer wanted       ->        free its blocks, once nothing is on the way
      Leave                              ->        Left

Messages between two ranks keep their order, so a Room refers to what the prefill driver knows from
earlier Tokens.
"""

from __future__ import annotations

import dataclasses
from array import array
from dataclasses import dataclass
from typing import Any

import msgpack

from sps2_mega.logprobs import TokenLogprob
from sps2_mega.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of both drivers: capacity of their pool.

    `shares_prefixes`: equal tokens have equal keys and values, whatever prompt they are in.
    """

    cache_tokens: int
    num_blocks: int
    shares_prefixes: bool


@dataclass(frozen=True, slots=True)
class Expect:
    """A sequence to decode, with the fields of `Sequence`; its first token follows with Start.

    `prefill_s` are the expected seconds of its prefill, 0 where nothing is known.
    """

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Room:
    """Blocks for a sequence's first `num_tokens` tokens, of which `first` are cached already.
    `handoff` is the number of this reservation in all that follows."""

    seq_id: int
    handoff: int
    num_tokens: int
    first: int
    block_ranks: list[int]
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Start:
    """All tokens of a handoff are computed and on their way; `token_id` is the next one."""

    seq_id: int
    handoff: int
    token_id: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The prefill driver has forgotten a sequence.

    `handoff` is the last one of it whose rows were or will be sent. `damaged`: their values are not
    finite.
    """

    seq_id: int
    handoff: int | None
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class NewToken:
    """One step's token of one sequence, None where the model gave no finite logits. With a `reason`
    it was the last one."""

    seq_id: int
    token_id: int | None
    logprob: TokenLogprob | None
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a decode step, and the blocks in use on each SP rank after it."""

    tokens: list[NewToken]
    used_per_rank: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arrived:
    """All of a handoff that the sending decode rank expects is in its cache."""

    handoff: int


@dataclass(frozen=True, slots=True)
class Leave:
    """End of the job: requests in flight are dropped."""


@dataclass(frozen=True, slots=True)
class Left:
    """Nothing is on its way to the decode ranks any more."""


ControlMessage = Hello | Expect | Room | Start | Drop | Tokens | Arrived | Leave | Left

_KINDS: tuple[type, ...] = (Hello, Expect, Room, Start, Drop, Tokens, Arrived, Leave, Left)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
# Fields whose integers travel as 64-bit words: a prompt of a million tokens is 8 MB.
_LONG_LISTS = {"prompt_token_ids", "block_ranks", "block_ids"}


def kind_of(message: ControlMessage) -> int:
    """Number of a message's type."""
    return _NUMBERS[type(message)]


def encode(message: ControlMessage) -> bytes:
    """Fields of a message; its type travels as `kind_of`."""
    return bytes(msgpack.packb([_pack(f, getattr(message, f)) for f in _names(type(message))]))


def decode(kind: int, payload: bytes) -> ControlMessage:
    """Message from its kind and fields."""
    made = _KINDS[kind]
    values = msgpack.unpackb(payload, use_list=False)
    message: ControlMessage = made(
        *(_unpack(name, value) for name, value in zip(_names(made), values, strict=True))
    )
    return message


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _pack(name: str, value: Any) -> Any:
    if name in _LONG_LISTS:
        return array("q", value).tobytes()
    if name == "params":
        return [getattr(value, field) for field in _PARAM_NAMES]
    if name == "tokens":
        return [
            (t.seq_id, t.token_id, t.logprob and dataclasses.astuple(t.logprob), t.reason)
            for t in value
        ]
    return value


def _unpack(name: str, value: Any) -> Any:
    if name in _LONG_LISTS:
        values = array("q")
        values.frombytes(value)
        return values.tolist()
    if name == "params":
        return SamplingParams(**dict(zip(_PARAM_NAMES, value, strict=True)))
    if name == "tokens":
        return [
            NewToken(
                seq_id,
                token_id,
                logprob and TokenLogprob(*logprob),
                None if reason is None else FinishReason(reason),
            )
            for seq_id, token_id, logprob, reason in value
        ]
    return value
