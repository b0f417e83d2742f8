"""Requests for a server from a workload's arrivals: scaled, cut to what fits, with real prompts.

    Arrival (times, lengths, names of shared blocks) --scaled--> Arrival --prompts--> TimedRequest

Equal names become equal tokens, also where lengths are scaled, so that prefix caches find what they
found where the trace was taken. Decides nothing about when requests are sent.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.arrivals import Arrival

PromptKind = Literal["ids", "characters", "words"]

# One token each in common vocabularies, with the space before it.
_WORDS = [
    "the", "of", "and", "to", "in", "is", "was", "for", "that", "on", "as", "with", "by", "at",
    "from", "it", "are", "be", "this", "which", "or", "an", "they", "have", "not", "were",
    "their", "one", "all", "we", "can", "her", "has", "there", "been", "if", "more", "when",
    "will", "would", "who", "so", "no", "out", "up", "time", "people", "year", "way", "day",
    "man", "thing", "woman", "life", "child", "world", "school", "state", "family", "student",
    "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRequest:
    """A request and its time; `due_s` counts from the workload's start.

    `prompt_len` is the workload's, in units of the prompt's kind.
    """

    due_s: float
    prompt: str | list[int]
    prompt_len: int
    output_len: int


def scaled(
    arrivals: Sequence[Arrival], *, time: float = 1.0, length: float = 1.0, output: float = 1.0
) -> list[Arrival]:
    """Arrivals with times, prompt lengths and output lengths multiplied by these factors.

    Shared blocks shrink and grow with the prompts.

    Raises:
        ConfigError: a factor is not positive.
    """
    if min(time, length, output) <= 0:
        raise ConfigError(f"scales must be > 0, got time {time}, length {length}, output {output}")
    return [
        dataclasses.replace(
            arrival,
            time_s=arrival.time_s * time,
            prompt_len=max(1, round(arrival.prompt_len * length)),
            output_len=max(1, round(arrival.output_len * output)),
            hash_block=math.ceil(arrival.hash_block * length),
        )
        for arrival in arrivals
    ]


def fitting(arrivals: Sequence[Arrival], max_len: int | None) -> list[Arrival]:
    """Arrivals whose prompt and output together fit a context of `max_len` tokens (None: all)."""
    if max_len is None:
        return list(arrivals)
    return [item for item in arrivals if item.prompt_len + item.output_len <= max_len]


def with_prompts(
    arrivals: Sequence[Arrival], *, kind: PromptKind, ids: range, salt: str
) -> list[TimedRequest]:
    """Requests with prompts: token ids out of `ids`, characters of these codes, or English words.

    Only prompts of the same `salt` share anything, so that another run does not find this one's in
    a cache.
    """
    return [
        TimedRequest(
            due_s=arrival.time_s,
            prompt=_prompt(arrival, number, kind=kind, ids=ids, salt=salt),
            prompt_len=arrival.prompt_len,
            output_len=arrival.output_len,
        )
        for number, arrival in enumerate(arrivals)
    ]


def id_range(text: str) -> range:
    """Range named LOW-HIGH, both ends included.

    Raises:
        ConfigError: it is not one.
    """
    low, dash, high = text.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise ConfigError(f"token ids must be given as LOW-HIGH, as in 32-126, got {text!r}")
    return range(int(low), int(high) + 1)


def _prompt(
    arrival: Arrival, number: int, *, kind: PromptKind, ids: range, salt: str
) -> str | list[int]:
    drawn = _draws(arrival, number, count=len(_WORDS) if kind == "words" else len(ids), salt=salt)
    if kind == "words":
        return " ".join(_WORDS[value] for value in drawn)
    tokens = [ids[value] for value in drawn]
    return tokens if kind == "ids" else "".join(map(chr, tokens))


def _draws(arrival: Arrival, number: int, *, count: int, salt: str) -> list[int]:
    """`prompt_len` numbers below `count`, equal wherever the trace has the same name."""
    if not arrival.hash_ids:
        return random.Random(f"{salt} alone {number}").choices(range(count), k=arrival.prompt_len)
    drawn: list[int] = []
    for name in arrival.hash_ids:
        source = random.Random(f"{salt} block {name}")
        drawn += source.choices(range(count), k=arrival.hash_block)
    return drawn[: arrival.prompt_len]
