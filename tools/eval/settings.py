"""Attention settings by name, as `keys-d4-nohalo`, and what each costs: no torch, no model.

dense              exact attention
keys-d4            far keys strided by 4, with sinks, halo and exact tail
keys-d2.4          three levels: 1 key in 2 of the middle one, 1 in 4 beyond
local              no far keys at all: the own cell, sinks, halo and exact tail
paper-d4           far keys and queries strided, and nothing else, as the paper's code does
...-nosinks  ...-nohalo  ...-notail      without one of them; -tail gives `paper` the exact tail
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from sps2_mega.attention.pattern import CSAPattern
from sps2_mega.attention.volume import flops_ratio, visible_keys
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError

DEFAULT_SETTINGS = (
    "dense",
    "keys-d2",
    "keys-d4",
    "keys-d8",
    "keys-d2.4",
    "keys-d4-nohalo",
    "keys-d4-notail",
    "local",
    "paper-d4",
    "paper-d4-tail",
)
_NAME = re.compile(
    r"(?P<kind>dense|local|keys|paper)(?:-d(?P<degrees>\d+(?:\.\d+)*))?"
    r"(?P<changes>(?:-(?:nosinks|nohalo|notail|tail))*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extents:
    """Tokens that settings share. Spans are tokens (int) or shares of the length (Fraction), nearest first;
    a setting of n levels takes the first n-1."""

    spans: tuple[int | Fraction, ...]
    sinks: int
    halo: int
    tail: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a whole prompt relative to dense attention. `flops`: attention pairs computed. `keys_moved`: rows of K
    and V that cells of the nearest span need from each other, where each cell is a rank. The exact tail moves
    queries instead; it is in `flops` and not in `keys_moved`."""

    flops: float
    keys_moved: float


def parse_span(text: str) -> int | Fraction:
    """`256` tokens, or `1/8` of the length.

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


def csa_config(name: str, length: int, extents: Extents) -> CSAConfig:
    """The configuration that `name` stands for at prompts of `length` tokens.

    Raises:
        ConfigError: the name is not understood, or there are fewer spans than it has levels.
    """
    match = _NAME.fullmatch(name)
    if match is None or (match["degrees"] is None) != (match["kind"] in ("dense", "local")):
        raise ConfigError(
            f"setting {name!r}: use dense, local, keys-dN or paper-dN (N.M for three levels), "
            "then -nosinks, -nohalo, -notail or -tail"
        )
    kind, changes = match["kind"], match["changes"].split("-")[1:]
    if kind == "dense":
        if changes:
            raise ConfigError(f"setting {name!r}: dense has no sinks, halo or tail")
        return CSAConfig()
    # A stride as long as the prompt leaves each head one key, among the first few tokens.
    far = [length] if kind == "local" else [int(part) for part in match["degrees"].split(".")]
    if len(far) > len(extents.spans):
        raise ConfigError(
            f"setting {name!r} has {len(far) + 1} levels and needs {len(far)} spans, "
            f"got {len(extents.spans)}"
        )
    spans = [
        span if isinstance(span, int) else max(1, int(span * length)) for span in extents.spans
    ]
    paper = kind == "paper"
    return CSAConfig(
        degrees=(1, *far),
        spans=tuple(spans[: len(far)]),
        sinks=0 if paper or "nosinks" in changes else extents.sinks,
        halo=0 if paper or "nohalo" in changes else extents.halo,
        tail=0 if (paper and "tail" not in changes) or "notail" in changes else extents.tail,
        sample_queries=paper,
    )


def cost(csa: CSAConfig, length: int, model: ModelConfig) -> Cost:
    """Exact counts for a prompt of `length` tokens, averaged over the model's first layers."""
    if csa.exact or csa.spans is None:
        return Cost(flops=1.0, keys_moved=1.0)
    pattern = CSAPattern(
        degrees=csa.degrees,
        spans=csa.spans,
        sinks=csa.sinks,
        halo=csa.halo,
        tail=csa.tail,
        sample_queries=csa.sample_queries,
    )
    heads = range(model.num_kv_heads)
    layers = range(min(model.num_layers, 4))
    cells = [
        range(start, min(start + csa.spans[0], length - csa.tail))
        for start in range(csa.spans[0], length - csa.tail, csa.spans[0])
    ]
    moved = sum(
        part.num_rows
        for layer in layers
        for cell in cells
        for part in visible_keys(
            pattern,
            prompt_len=length,
            queries=cell,
            keys=range(cell.start),
            kv_heads=heads,
            layer=layer,
        )
    )
    all_rows = len(layers) * len(heads) * sum(cell.start for cell in cells)
    ratios = [flops_ratio(pattern, prompt_len=length, kv_heads=heads, layer=i) for i in layers]
    return Cost(flops=sum(ratios) / len(ratios), keys_moved=moved / all_rows if all_rows else 0.0)
