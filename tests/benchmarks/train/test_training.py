"""Model, initial weights, optimisation: transformers' numbers, working circuit, exact resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.train.config import load_train_config
from benchmarks.train.export import load_model, save_model
from benchmarks.train.initial_weights import initialise
from benchmarks.train.loop import Trainer
from benchmarks.train.model import TinyLlama, token_losses
from benchmarks.train.optimizer import rate_factor
from sps2_mega.errors import CheckpointError, ConfigError
from tests.benchmarks.train.tiny_run import ARCHITECTURE, corpus, run_config

COMMITTED = Path(__file__).resolve().parents[3] / "benchmarks" / "train" / "sps2-tiny.yaml"


def test_saved_weights_give_transformers_the_same_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = TinyLlama(ARCHITECTURE)
    save_model(model, tmp_path)
    tokens = torch.randint(0, 260, (2, 63))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
        ours = load_model(tmp_path)(tokens, torch.arange(63).expand(2, -1))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path)("é!")["input_ids"] == [256, *"é!".encode()]


def test_a_folder_that_is_not_such_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(tmp_path)
    save_model(TinyLlama(ARCHITECTURE), tmp_path)
    described = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        described.replace('"hidden_size": 128', '"hidden_size": 64')
    )
    with pytest.raises(CheckpointError, match="embed_tokens"):
        load_model(tmp_path)


def test_the_initial_weights_already_continue_a_repetition() -> None:
    architecture = load_train_config(COMMITTED, "cpu").architecture
    model = TinyLlama(architecture)
    initialise(model, seed=1)
    half = torch.randint(97, 123, (2, 101), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.full((2, 1), 256), half, half], dim=1)
    with torch.no_grad():
        logits = model(tokens[:, :-1], torch.arange(202).expand(2, -1))
    losses = token_losses(logits, tokens[:, 1:])
    assert losses[:, 115:].mean() < 2.5  # nats; 3.3 is chance among 26 letters
    assert losses[:, :101].mean() > 4.5


def test_initial_weights_follow_from_the_seed() -> None:
    models = [TinyLlama(ARCHITECTURE) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, seed)
    first, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_architecture_without_room_for_the_circuit_is_refused() -> None:
    narrow = dataclasses.replace(ARCHITECTURE, num_kv_heads=8)
    with pytest.raises(ConfigError, match="4 KV heads"):
        initialise(TinyLlama(narrow), seed=1)


def test_six_steps_equal_three_and_three_after_a_restart(tmp_path: Path) -> None:
    read = corpus(tmp_path)
    config = run_config()
    whole = Trainer(config, read, "cpu")
    whole.train(6)
    first = Trainer(config, read, "cpu")
    first.train(3, tmp_path / "checkpoint.pt")
    second = Trainer(config, read, "cpu")
    second.load(tmp_path / "checkpoint.pt")
    assert second.step == 3
    second.train(6, tmp_path / "checkpoint.pt")
    for (name, expected), (_, actual) in zip(
        whole.model.state_dict().items(), second.model.state_dict().items(), strict=True
    ):
        assert torch.equal(actual, expected), name
    start = Trainer(config, read, "cpu").model.layers[1].mlp.gate_proj.weight
    assert not torch.equal(whole.model.layers[1].mlp.gate_proj.weight, start)
    assert [record["step"] for record in second.log] == [2, 3, 4, 6]
    assert not list(tmp_path.glob("*.partial"))


def test_another_configurations_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    read = corpus(tmp_path)
    trainer = Trainer(run_config(), read, "cpu")
    trainer.save(tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="fingerprint"):
        Trainer(run_config(seed=5), read, "cpu").load(tmp_path / "checkpoint.pt")


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    stage = dataclasses.replace(run_config().stages[0], steps=40)
    trainer = Trainer(run_config(stages=(stage,), log_every=10), corpus(tmp_path), "cpu")
    trainer.train(40)
    bits = [record["code_bits_per_byte"] for record in trainer.log]
    assert bits[-1] < 0.6 * bits[0]


def test_the_rate_warms_up_stays_and_falls_to_its_end() -> None:
    config = run_config().optimizer
    factors = [rate_factor(step, 100, config) for step in range(100)]
    assert factors[0] == 0.5 and factors[1] == 1.0 and factors[39] == 1.0
    assert factors[41:] == sorted(factors[41:], reverse=True)
    assert factors[-1] == pytest.approx(config.final_lr)
