"""Attention settings by name, as `keys-d4-b16-nohalo`, and what each means: no torch, no model.

dense              exact attention
keys-d4            far keys strided by 4, with sinks, halo and exact tail
keys-d2.4          three levels: 1 key in 2 of the middle one, 1 in 4 beyond; keys-d2.4.8 has four
local              no far keys at all: the own cell, sinks, halo and exact tail
paper-d4           far keys and queries strided, and nothing else, as the paper's code does
...-b16            blocks of 16 neighbouring keys are kept or dropped together
...-nosinks  ...-nohalo  ...-notail      without one of them; -tail gives `paper` the exact tail
...-stridedecode   generated tokens too see only what the pattern shows; otherwise they see all keys
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sps2_mega.attention.csa.pattern import MAX_DEGREE
from sps2_mega.config import CSAConfig
from sps2_mega.errors import ConfigError

DEFAULT_SETTINGS = (
    "dense",
    "keys-d2",
    "keys-d4",
    "keys-d8",
    "keys-d2.4",
    "keys-d2.4.8",
    "keys-d4-b16",
    "keys-d4-nohalo",
    "keys-d2-notail",
    "keys-d4-notail",
    "keys-d4-stridedecode",
    "keys-d4-notail-stridedecode",
    "local",
    "paper-d2",
    "paper-d4",
    "paper-d4-tail",
)
_NAME = re.compile(
    r"(?P<kind>dense|local|keys|paper)(?:-d(?P<degrees>\d+(?:\.\d+)*))?(?:-b(?P<block>\d+))?"
    r"(?P<changes>(?:-(?:nosinks|nohalo|notail|tail|stridedecode))*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extents:
    """Tokens that settings share.

    Spans are tokens (int) or shares of the length (Fraction), nearest first. A setting of n levels
    takes the first one and, beyond it, the last n-2.
    """

    spans: tuple[int | Fraction, ...]
    sinks: int
    halo: int
    tail: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Pattern of a prefill, and whether generated tokens follow it or see all keys."""

    csa: CSAConfig
    sparse_decode: bool


def parse_span(text: str) -> int | Fraction:
    """Span from `256` (tokens) or `1/8` (of the length).

    Raises:
        ConfigError: it is neither.
    """
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if share <= 0 or (share.denominator > 1 and share >= 1):
        raise ConfigError(f"a span is a number of tokens or a share such as 1/8, got {text!r}")
    return share if share.denominator > 1 else int(share)


def named_setting(name: str, length: int, extents: Extents) -> Setting:
    """Setting of that name for prompts of `length` tokens.

    Raises:
        ConfigError: the name is not understood, or there are fewer spans than it has levels.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["degrees"] is None) != (match["kind"] in ("dense", "local")):
        raise ConfigError(
            f"setting {name!r}: use dense, local, keys-dN or paper-dN (N.M for three levels), "
            "then -bN for "
            "blocks of N keys, then -nosinks, -nohalo, -notail, -tail or -stridedecode"
        )
    kind, changes = match["kind"], match["changes"].split("-")[1:]
    if kind == "dense":
        if changes or match["block"]:
            raise ConfigError(f"setting {name!r}: dense has no sinks, halo, tail, block or stride")
        return Setting(csa=CSAConfig(), sparse_decode=False)
    # A stride as long as the prompt leaves each head one key, among the first few tokens.
    local = [max(1, min(length, MAX_DEGREE))]
    far = local if kind == "local" else [int(part) for part in match["degrees"].split(".")]
    paper = kind == "paper"
    csa = CSAConfig(
        degrees=(1, *far),
        spans=_spans(name, len(far), length, extents),
        sinks=0 if paper or "nosinks" in changes else extents.sinks,
        halo=0 if paper or "nohalo" in changes else extents.halo,
        tail=0 if (paper and "tail" not in changes) or "notail" in changes else extents.tail,
        sample_queries=paper,
        block=int(match["block"] or 1),
    )
    return Setting(csa=csa, sparse_decode="stridedecode" in changes)


def _spans(name: str, count: int, length: int, extents: Extents) -> tuple[int, ...]:
    if count > len(extents.spans):
        raise ConfigError(
            f"setting {name!r} has {count + 1} levels and needs {count} spans, "
            f"got {len(extents.spans)}"
        )
    chosen = [extents.spans[0], *extents.spans[len(extents.spans) - count + 1 :]]
    return tuple(s if isinstance(s, int) else max(1, int(s * length)) for s in chosen)
