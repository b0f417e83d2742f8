"""Check that a source holds exactly the model, with all problems in one line.

Missing, left-over and wrongly shaped names are problems. Vocabulary rows are the one tolerance: a
file may have more (Megatron pads them), never fewer.
"""

from __future__ import annotations

from sps2_mega.checkpoint.canonical import VOCAB_NAMES, Shape, canonical_shapes
from sps2_mega.checkpoint.source import WeightSource
from sps2_mega.config import ModelConfig
from sps2_mega.errors import CheckpointError

_SHOWN = 8


def check_complete(source: WeightSource, config: ModelConfig) -> None:
    """Compare names and shapes; no data is read.

    Raises:
        CheckpointError: lists every name that does not fit.
    """
    found, expected = source.shapes(), canonical_shapes(config)
    missing = [f"{name} (from {source.origin(name)})" for name in expected if name not in found]
    left_over = [f"{name} {list(shape)}" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{name}: expected {list(shape)}, found {list(found[name])}"
        for name, shape in expected.items()
        if name in found and not _fits(name, shape, found[name])
    ]
    raise_if_any(
        {"missing": missing, "left over": left_over, "wrong shape": wrong}, str(source.path)
    )


def raise_if_any(problems: dict[str, list[str]], where: str) -> None:
    """Raise one CheckpointError with every kind of problem that has entries."""
    parts = [_section(title, entries) for title, entries in problems.items() if entries]
    if parts:
        raise CheckpointError(f"{where} does not fit the model: " + "; ".join(parts))


def _fits(name: str, expected: Shape, found: Shape) -> bool:
    if name in VOCAB_NAMES and len(found) == len(expected):
        return found[0] >= expected[0] and found[1:] == expected[1:]
    return found == expected


def _section(title: str, entries: list[str]) -> str:
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{title} ({len(entries)}): {', '.join(entries[:_SHOWN])}{more}"
