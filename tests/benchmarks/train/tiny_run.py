"""A library of a few generated files and a configuration that trains on it in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.train.config import CorpusConfig, OptimizerConfig, Stage, TrainConfig
from benchmarks.train.corpus import Corpus, read_corpus
from sps2_mega.config import ModelConfig, RopeConfig

ARCHITECTURE = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=72,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=260,
    max_position_embeddings=512,
    tie_embeddings=True,
    rope=RopeConfig(theta=100000.0),
    bos_token_id=256,
    eos_token_ids=(257,),
)


MIX = {"code": 0.4, "key_value": 0.3, "copy": 0.3}


def run_config(**changes: object) -> TrainConfig:
    fields: dict = dict(
        architecture=ARCHITECTURE,
        seed=3,
        corpus=CorpusConfig(hold_out_every=3, max_file_bytes=50_000, exclude=("tests",)),
        optimizer=OptimizerConfig(
            muon_lr=0.01,
            adam_lr=0.001,
            momentum=0.9,
            weight_decay=0.01,
            warmup_steps=2,
            decay_from=0.4,
            final_lr=0.1,
            max_grad_norm=1.0,
        ),
        stages=(
            Stage(length=97, batch=3, steps=4, jump=0.5, max_position=301, mix=MIX),
            Stage(length=203, batch=1, steps=2, jump=0.0, max_position=203, mix={"passkey": 1.0}),
        ),
        compile=False,
        log_every=2,
        checkpoint_every=2,
    )
    return TrainConfig(**fields | changes)


def write_library(folder: Path, num_files: int = 9) -> None:
    rng = np.random.default_rng(0)
    for i in range(num_files):
        lines = [f"def f{i}_{j}(x):\n    return x + {rng.integers(1000)}\n" for j in range(60)]
        (folder / f"module{i}.py").write_text("\n".join(lines))


def corpus(folder: Path) -> Corpus:
    write_library(folder)
    return read_corpus(run_config().corpus, folder)
