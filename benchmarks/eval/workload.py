"""Workload of every setting: held-out windows and probes of each length and seed, made once.

Decides how texts and probes are spread over lengths and seeds. Rank 0's are sent to the other
ranks.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.eval.tasks import Probe, make_probe
from benchmarks.eval.texts import load_texts, windows
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.config import EngineConfig
from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Amounts: `texts` windows per length and seed, `probes` per task, length, depth and seed."""

    lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    texts: int
    tasks: tuple[str, ...]
    depths: tuple[float, ...]
    probes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Windows and probes by length, all seeds together."""

    windows: dict[int, list[list[int]]]
    probes: dict[int, list[Probe]]

    def pack(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @staticmethod
    def unpack(packed: bytes) -> Workload:
        given = json.loads(packed)
        return Workload(
            windows={int(length): found for length, found in given["windows"].items()},
            probes={int(n): [Probe(**p) for p in found] for n, found in given["probes"].items()},
        )


def prepare(
    amounts: Amounts, config: EngineConfig, data: Path | None
) -> tuple[Tokenizer, Workload]:
    """The model's tokenizer, and windows and probes in its tokens.

    Raises:
        ConfigError: there is no tokenizer, too little data, or a length too short for a task.
    """
    resolved = resolve_model(config.model, tokenizer=config.tokenizer, config=config.config)
    if resolved.tokenizer is None:
        raise ConfigError(f"{config.model} has no tokenizer: name one with --tokenizer")
    tokenizer = Tokenizer.load(resolved.tokenizer)
    texts = load_texts(data)
    work = Workload(windows={}, probes={})
    for length in amounts.lengths:
        work.windows[length] = [
            window
            for seed in amounts.seeds
            for window in windows(texts, tokenizer, length=length, count=amounts.texts, seed=seed)
        ]
        work.probes[length] = [
            make_probe(
                task,
                length=length,
                depth=depth,
                index=index,
                seed=seed,
                texts=texts,
                tokenizer=tokenizer,
            )
            for seed in amounts.seeds
            for task in amounts.tasks
            for depth in amounts.depths
            for index in range(amounts.probes)
        ]
    return tokenizer, work
