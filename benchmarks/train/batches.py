"""The batch of a step, as a pure function of seed and step.

Nothing is remembered between steps: a resumed run needs no position in the data and no state of a
generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.train.config import Stage, TrainConfig
from benchmarks.train.corpus import BOS, Corpus
from benchmarks.train.tasks import make_document
from sps2_mega.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Arrays of one step, all [batch, length].

    Token i of `inputs` predicts `targets` i; `positions` rise, not always by one.
    """

    inputs: np.ndarray  # int64
    targets: np.ndarray  # int64
    weights: np.ndarray  # float32
    positions: np.ndarray  # int64


class BatchMaker:
    """Source of batches; `batch(step)` is always the same for the same configuration.

    Raises:
        ConfigError: no file is long enough to fill a document with code.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        self._config = config
        self._stream = corpus.train_stream()
        longest = max(stage.length for stage in config.stages)
        self._long_files = [text for text in corpus.train.values() if len(text) > 2 * longest]
        if not self._long_files:
            raise ConfigError(
                f"tasks of {longest} bytes need a training file of more than {2 * longest} bytes,"
                f" the longest has {max(map(len, corpus.train.values()))}"
            )
        sizes = np.array([len(text) for text in self._long_files], dtype=float)
        self._file_shares = sizes / sizes.sum()

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng([self._config.seed, step])
        stage = self._config.stage_at(step)
        documents = [self._document(rng, stage) for _ in range(stage.batch)]
        targets = np.stack([tokens for tokens, _ in documents]).astype(np.int64)
        first = np.full((stage.batch, 1), BOS)
        return Batch(
            inputs=np.concatenate([first, targets[:, :-1]], axis=1),
            targets=targets,
            weights=np.stack([weights for _, weights in documents]),
            positions=np.stack([positions(rng, stage) for _ in range(stage.batch)]),
        )

    def _document(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        length = stage.length
        kind = list(stage.mix)[rng.choice(len(stage.mix), p=np.array(list(stage.mix.values())))]
        if kind == "code":
            start = rng.integers(len(self._stream) - length)
            tokens = self._stream[start : start + length]
            return tokens, (tokens != BOS).astype(np.float32)
        file = self._long_files[rng.choice(len(self._long_files), p=self._file_shares)]
        start = rng.integers(len(file) - 2 * length + 1)
        return make_document(kind, rng, length, file[start : start + 2 * length])


def positions(rng: np.random.Generator, stage: Stage) -> np.ndarray:
    """Positions [length] from 0, with at most one jump, below the stage's `max_position`."""
    result = np.arange(stage.length)
    if rng.random() < stage.jump:
        cut = int(rng.integers(1, stage.length))
        result[cut:] += int(rng.integers(0, stage.max_position - stage.length + 1))
    return result
