"""The training loop: steps, log, checkpoints, resumption.

A checkpoint holds weights, optimizers' states, the number of finished steps and the log. Data and
initial weights follow from the configuration's seed and the step alone, so there is no generator's
state to keep, and a resumed run computes what an uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.train.batches import BatchMaker
from benchmarks.train.config import TrainConfig
from benchmarks.train.corpus import Corpus
from benchmarks.train.initial_weights import initialise
from benchmarks.train.model import TinyLlama, token_losses
from benchmarks.train.optimizer import make_optimizers, rate_factor, set_rates
from benchmarks.train.tasks import FIRST
from sps2_mega.errors import ConfigError

Record = dict[str, float]


class Trainer:
    """Model, optimizers and log, which always belong to the same finished step."""

    def __init__(self, config: TrainConfig, corpus: Corpus, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        self.step = 0
        self.log: list[Record] = []
        self.seconds = 0.0
        self.model = TinyLlama(config.architecture)
        initialise(self.model, config.seed)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, config.optimizer)
        self._batches = BatchMaker(config, corpus)
        self._loss = self._losses
        if config.compile:
            self._loss = torch.compile(self._losses, dynamic=False)

    def train(
        self, until: int, checkpoint: Path | None = None, on_log: Callable[[], None] | None = None
    ) -> None:
        """Run until step `until`; save to `checkpoint` on the way and at the end."""
        bar = tqdm(total=self.config.num_steps, initial=self.step, unit="step", dynamic_ncols=True)
        sums: list[Tensor] = []
        while self.step < until:
            began = time.perf_counter()
            sums.append(self._one_step())
            self.seconds += time.perf_counter() - began
            self.step += 1
            bar.update()
            if self.step % self.config.log_every == 0 or self.step == until:
                self.log.append(self._record(torch.stack(sums).sum(0).tolist()))
                sums = []
                bar.set_postfix(_short(self.log[-1]))
                if on_log:
                    on_log()
            if checkpoint and (self.step % self.config.checkpoint_every == 0 or self.step == until):
                self.save(checkpoint)
        bar.close()

    def _one_step(self) -> Tensor:
        """Sums of one step: loss, nats of code, bytes of code, answers found, answers in all."""
        batch = self._batches.batch(self.step)
        arrays = (batch.inputs, batch.positions, batch.targets, batch.weights)
        tensors = [torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays]
        loss, sums = self._loss(*tensors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.max_grad_norm, error_if_nonfinite=True
        )
        factor = rate_factor(self.step, self.config.num_steps, self.config.optimizer)
        set_rates(self.optimizers, factor, self.config.optimizer)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return sums

    def _losses(
        self, inputs: Tensor, positions: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits = self.model(inputs, positions)
        losses = token_losses(logits, targets)
        loss = (losses * weights).sum() / weights.numel()
        code, answers = (weights == 1.0).float(), (weights == FIRST).float()
        found = (logits.detach().argmax(-1) == targets).float() * answers
        sums = [loss.detach(), (losses.detach() * code).sum(), code.sum()]
        return loss, torch.stack([*sums, found.sum(), answers.sum()])

    def _record(self, sums: list[float]) -> Record:
        loss, nats, num_bytes, found, asked = sums
        steps = self.step - (self.log[-1]["step"] if self.log else 0)
        return {
            "step": self.step,
            "length": self.config.stage_at(self.step - 1).length,
            "loss": loss / max(1, steps),
            "code_bits_per_byte": nats / max(1.0, num_bytes) / math.log(2),
            "first_digit_accuracy": found / max(1.0, asked),
            "seconds": self.seconds,
        }

    def save(self, path: Path) -> None:
        state = {
            "fingerprint": self.config.fingerprint(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        # A crash in mid-write leaves the previous checkpoint.
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continue from the checkpoint `path`.

        Raises:
            ConfigError: it belongs to another configuration.
        """
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        if state["fingerprint"] != self.config.fingerprint():
            raise ConfigError(
                f"{path} is from a configuration with fingerprint {state['fingerprint']}, this "
                "one has"
                f" {self.config.fingerprint()}: give another --output, or --overwrite to begin "
                "again"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.log, self.seconds = state["step"], state["log"], state["seconds"]


def write_log(records: list[Record], path: Path) -> None:
    """JSON lines, one per record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _short(record: Record) -> dict[str, str]:
    return {
        "len": f"{record['length']}",
        "bpb": f"{record['code_bits_per_byte']:.3f}",
        "digit": f"{record['first_digit_accuracy']:.2f}",
    }
