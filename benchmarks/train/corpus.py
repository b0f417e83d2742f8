"""Python sources that every machine has: CPython's own standard library, with whole files held out.

Decides which files belong to the corpus and which of them are never trained on. The choice depends
on a file's path below the library alone, so most of it carries over to another version of Python.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.train.config import CorpusConfig
from sps2_mega.errors import ConfigError

BOS, EOS = 256, 257


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Names are paths below the library, in order; texts are arrays of bytes (uint8)."""

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]

    def train_stream(self) -> np.ndarray:
        """All training files in sequence, [N] int16, each between the tokens BOS and EOS."""
        parts: list[np.ndarray] = []
        for text in self.train.values():
            parts += [np.array([BOS]), text, np.array([EOS])]
        return np.concatenate(parts).astype(np.int16)


def read_corpus(config: CorpusConfig, library: Path | None = None) -> Corpus:
    """Sources below `library`, by default the running interpreter's standard library.

    Raises:
        ConfigError: there are no sources (some distributions ship compiled files only).
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, np.ndarray] = {}
    held_out: dict[str, np.ndarray] = {}
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library).as_posix()
        if set(name.split("/")[:-1]) & set(config.exclude):
            continue
        if not 0 < file.stat().st_size <= config.max_file_bytes:
            continue
        side = held_out if is_held_out(name, config.hold_out_every) else train
        side[name] = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    if not train or not held_out:
        raise ConfigError(
            f"{library} has {len(train)} files to train on and {len(held_out)} to hold out;"
            " both are needed: is the Python library installed with its sources?"
        )
    return Corpus(train=train, held_out=held_out)


def is_held_out(name: str, every: int) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % every == 0
