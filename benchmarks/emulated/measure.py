"""Measurement of all systems on one model and one prompt length, over all link rates.

Decides what is measured in which order: systems take turns at every rate, so that all meet the same
machine, and all get the same prompts. Answers are compared with those of one rank.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.emulated.figures import Sample, balanced_rate, middle_of, stages_of
from benchmarks.emulated.jobs import Jobs
from benchmarks.emulated.nodes import Cluster, Link, rate_name
from benchmarks.emulated.result import Run
from benchmarks.emulated.systems import System
from benchmarks.machine import stolen_since
from sps2_mega.config import EngineConfig
from sps2_mega.serving.llm import engine_config

_BLOCK = 16
_IDLE_S = 7200.0  # a job may wait this long for its turn
TOLERANCE = 1e-4  # of log-probabilities, float32


class Measurement:
    """Jobs of all systems, running side by side from `start` on."""

    def __init__(
        self, cluster: Cluster, jobs: Jobs, run: Run, *, model: str, latency_s: float, folder: Path
    ) -> None:
        self._cluster, self._jobs, self.run = cluster, jobs, run
        self._model, self._latency_s, self._folder = model, latency_s, folder
        self._answers: dict[tuple[str, int], dict[int, float]] = {}

    def start(self, systems: Sequence[System]) -> None:
        """Start jobs and run each once, so that nothing is measured for the first time."""
        self.set_rate(None)
        for system in systems:
            self._jobs.start(system.name, self._config(system))
        self._jobs.wait_ready()
        for system in systems:
            self._prefill(system, repeat=0)

    def start_for_tuning(self) -> None:
        """Start only what `find_balance` and `keep_best_chunk_size` need.

        Every idle rank costs memory and some time.
        """
        say(f"{self.run.shape.name}, {self.run.tokens} tokens: {len(self.run.systems)} systems")
        self.start([s for s in self.run.systems if s.name in ("alone", "ulysses") or s.rival])

    def start_others(self) -> None:
        self.start([s for s in self.run.systems if s.name not in self._jobs.running])

    def find_balance(self, rates: Sequence[float | None]) -> None:
        """Set `run.balance`, from three prompts of dense Ulysses at each rate."""
        system = next((s for s in self.run.systems if s.name == "ulysses"), None)
        if system is None:
            return
        samples = {}
        for rate in rates:
            if rate is not None:
                self.set_rate(rate)
                samples[rate] = middle_of([self._prefill(system, repeat=0) for _ in range(3)])
        found = balanced_rate(samples)
        if found is not None:
            self.run.balance = float(f"{found:.2g}")
        say(f"communication equals computation at {rate_name(found) if found else 'no rate given'}")

    def keep_best_chunk_size(self, rates: Sequence[float | None]) -> None:
        """End all chunked systems but the one with the least sum of times over `rates`.

        Each runs one prompt per rate.
        """
        rivals = [s for s in self.run.systems if s.rival]
        if len(rivals) < 2:
            return
        times = dict.fromkeys((s.name for s in rivals), 0.0)
        for rate in rates:
            self.set_rate(rate)
            for system in rivals:
                times[system.name] += self._prefill(system, repeat=0).ttft_s
        self.run.tuning = times
        best = min(times, key=lambda name: times[name])
        say(f"chunk sizes: {times}")
        for system in rivals:
            if system.name != best:
                self._jobs.end(system.name)
                self.run.systems.remove(system)

    def measure(self, rate: float | None, repeats: int) -> None:
        """Run all systems in turn, `repeats` times; the order alternates."""
        self.set_rate(rate)
        stolen = stolen_since()
        for repeat in range(1, repeats + 1):
            order = self.run.systems if repeat % 2 else self.run.systems[::-1]
            for system in order:
                sample = self._prefill(system, repeat=repeat)
                self.run.samples.setdefault(system.name, {}).setdefault(rate, []).append(sample)
        times = {
            name: round(middle_of(by_rate[rate]).ttft_s, 2)
            for name, by_rate in self.run.samples.items()
        }
        say(f"{rate_name(rate)}: {times}; other machines had {stolen():.1%} of the cores")

    def set_rate(self, rate: float | None) -> None:
        self._cluster.set_link(Link(bits_per_s=rate, latency_s=self._latency_s))

    def _config(self, system: System) -> EngineConfig:
        degrees = system.degrees(len(self._cluster.nodes))
        longest = self.run.tokens + 1 + self.run.decode
        blocks = -(-longest // _BLOCK)
        config = engine_config(
            self._model,
            **degrees,
            options={
                "num_blocks": -(-blocks // degrees["sp"]) + 2,
                "no_prefix_caching": True,  # every prompt is computed in full
                "dtype": "float32",
                "device": "cpu",
                "threads": 1,
                "max_model_len": longest,
                "step_timeout": _IDLE_S,
                **system.options,
            },
        )
        if not system.traced:
            return config
        return replace(config, trace=str(self._folder / f"{system.name}.trace"))

    def _prefill(self, system: System, *, repeat: int) -> Sample:
        tokens = prompt(self.run.tokens, self.run.shape.vocab_size, seed=repeat)
        measured = self._jobs.ask(system.name, tokens, 1 + self.run.decode)
        self._compare(system, repeat, measured.logprobs)
        return Sample(
            ttft_s=measured.ttft_s,
            tbt_s=statistics.median(measured.gaps_s) if measured.gaps_s else 0.0,
            exposed_comm_s=measured.exposed_comm_s,
            total_comm_s=measured.total_comm_s,
            **stages_of(measured.events),
        )

    def _compare(self, system: System, repeat: int, logprobs: dict[int, float]) -> None:
        """Compare with the first system that answered this prompt by the same rule (one rank)."""
        expected = self._answers.setdefault((system.answer, repeat), logprobs)
        # Only the likeliest tokens: the last ones of the list may be another choice among
        # equals.
        shared = expected.keys() & logprobs.keys()
        difference = max((abs(expected[t] - logprobs[t]) for t in shared), default=float("inf"))
        known = self.run.differences.get(system.name, 0.0)
        self.run.differences[system.name] = max(known, difference)


def prompt(length: int, vocab_size: int, *, seed: int) -> list[int]:
    """Random tokens, the same for the same numbers."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(length)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
