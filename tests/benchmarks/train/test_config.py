"""Strict reading of the training configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.train.config import load_train_config
from sps2_mega.errors import ConfigError

COMMITTED = Path(__file__).resolve().parents[3] / "benchmarks" / "train" / "sps2-tiny.yaml"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_committed_file_has_growing_stages_for_both_devices(device: str) -> None:
    config = load_train_config(COMMITTED, device)
    lengths = [stage.length for stage in config.stages]
    assert lengths == sorted(lengths) and lengths[-1] >= (2048 if device == "cpu" else 8192)
    assert config.architecture.hidden_size == 256
    assert config.architecture.max_position_embeddings == max(s.max_position for s in config.stages)
    last = config.num_steps - 1
    assert config.stage_at(0) is config.stages[0]
    assert config.stage_at(config.stages[0].steps) is config.stages[1]
    assert config.stage_at(last) is config.stages[-1]
    with pytest.raises(IndexError, match=str(config.num_steps)):
        config.stage_at(last + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sed": 1}, "sed"),
        ({"seed": None}, "seed"),
        ({"mixes": {"early": {"code": 0.5, "passkey": 0.4}}}, "0.9"),
        ({"mixes": {"early": {"code": 0.5, "riddle": 0.5}}}, "riddle"),
        ({"mixes": {"early": {"code": 1.0}}}, "'late'"),
        ({"architecture": "sps2-huge"}, "sps2-huge"),
        ({"corpus": {"hold_out_every": 20}}, "max_file_bytes"),
        ({"optimizer": {"muon_lr": "fast"}}, "adam_lr"),
        ({"runs": {"tpu": {}}}, "'cpu'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict, words: str) -> None:
    given = yaml.safe_load(COMMITTED.read_text()) | change
    if given["seed"] is None:
        del given["seed"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=words):
        load_train_config(file, "cpu")


def test_a_stage_cannot_be_longer_than_its_positions(tmp_path: Path) -> None:
    given = yaml.safe_load(COMMITTED.read_text())
    given["runs"]["cpu"]["stages"][0] |= {"length": 999, "max_position": 998}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(ConfigError, match=r"999.*998"):
        load_train_config(file, "cpu")


def test_only_what_changes_the_weights_changes_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(**change: object) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(COMMITTED.read_text()) | change))
        return load_train_config(file, "cpu").fingerprint()

    assert fingerprint(log_every=3, checkpoint_every=1) == fingerprint()
    assert fingerprint(seed=1) != fingerprint(seed=2)
