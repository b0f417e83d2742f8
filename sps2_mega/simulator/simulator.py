"""Discrete-event simulation: arrivals, ends of steps and handovers; every engine has a scheduler.

A request is routed to the engine with the fewest tokens to do. Disaggregated systems hand a
sequence over after its first token: keys and values travel layer by layer while prefill runs, so
only what does not fit into that time, and the last layer, delays it.

    arrival -> engine: plan, cost, commit, plan, ... -> first token -> (decode engine) -> last token
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sps2_mega.config import ModelConfig, SchedulerConfig
from sps2_mega.metrics import StepMeter, timings_of
from sps2_mega.outputs import Timings
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.engine import SimulatedEngine, scheduler_config
from sps2_mega.simulator.hardware import Hardware
from sps2_mega.simulator.step_cost import step_cost
from sps2_mega.simulator.system import System
from sps2_mega.types import SamplingParams, Sequence

_PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)  # lengths are the trace's


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """Record of a simulation.

    `timings` are those of finished requests in order of arrival, `refused` counts the others;
    `duration_s` lasts to the last token, `terms` are seconds of all steps. `meters` are one per
    engine.
    """

    system: System
    timings: tuple[Timings, ...]
    prompt_lens: tuple[int, ...]
    refused: int
    duration_s: float
    terms: dict[str, float]
    meters: tuple[StepMeter, ...]
    busy_share: float
    peak_kv_usage: float
    num_preemptions: int
    cached_tokens: int


def simulate(
    arrivals: Iterable[Arrival],
    system: System,
    model: ModelConfig,
    hardware: Hardware,
    *,
    ffn_itemsize: int | None = None,
    on_finished: Callable[[], None] | None = None,
) -> SimulatedRun:
    """Serve all arrivals, given in order of time; deterministic in its arguments.

    Raises:
        ConfigError: the model does not fit the GPUs, or degrees do not fit the nodes.
    """
    ordered = list(arrivals)
    run = _Run(ordered, system, model, hardware, ffn_itemsize, on_finished)
    return run.to_the_end()


class _Run:
    """One simulation; every sequence is in exactly one engine, or handed over, or done."""

    def __init__(
        self,
        arrivals: list[Arrival],
        system: System,
        model: ModelConfig,
        hardware: Hardware,
        ffn_itemsize: int | None,
        on_finished: Callable[[], None] | None,
    ) -> None:
        self._arrivals, self._system, self._on_finished = arrivals, system, on_finished
        # Traces may be longer than a model's own limit: what counts here is cost, and refusals are
        # the cache's.
        longest = max((a.prompt_len + a.output_len for a in arrivals), default=1) + 1
        cost = step_cost(
            system, model, hardware, tp=system.tp, sp=system.sp, ffn_itemsize=ffn_itemsize
        )
        self._first = [
            SimulatedEngine(cost, scheduler_config(cost), max_model_len=longest)
            for _ in range(system.replicas)
        ]
        self._second: list[SimulatedEngine] = []
        if system.decode_replicas:
            decode = step_cost(
                system.replace(dcp=1),
                model,
                hardware,
                tp=system.decode_tp,
                sp=system.decode_sp,
                ffn_itemsize=ffn_itemsize,
            )
            # Every step decodes all and lets newcomers in, whole: what they bring has been computed
            # already.
            config = SchedulerConfig(
                policy="sarathi", chunk_tokens=2**30, max_running=system.max_running
            )
            self._second = [
                SimulatedEngine(decode, config, max_model_len=longest, receives=True)
                for _ in range(system.decode_replicas)
            ]
        # Keys and values leave by the network cards of all prefill GPUs at once.
        self._handover_s = (
            cost.size.kv_bytes(system.tp) / system.sp / hardware.inter_node.bytes_per_s
        )
        self._num_layers, self._latency_s = cost.size.num_layers, hardware.inter_node.latency_s
        self._ids = itertools.count()
        self._events: list[tuple[float, int, SimulatedEngine, Sequence | None]] = []
        self._sequences: dict[int, Sequence] = {}
        self._lens: dict[int, tuple[int, int]] = {}
        self._timings: dict[int, Timings] = {}
        self._refused = self._preemptions = self._cached = 0
        self._now = 0.0

    def to_the_end(self) -> SimulatedRun:
        coming = iter(enumerate(self._arrivals))
        following = next(coming, None)
        while following is not None or self._events:
            if following is not None and (
                not self._events or following[1].time_s <= self._events[0][0]
            ):
                self._now = max(self._now, following[1].time_s)
                self._arrive(*following)
                following = next(coming, None)
                continue
            self._now, _, engine, handed_over = heapq.heappop(self._events)
            if handed_over is not None:
                self._enter(engine, handed_over)
            else:
                for sequence in engine.finish_step(self._now):
                    self._leave(engine, sequence)
                self._go_on(engine)
        return self._result()

    def _arrive(self, number: int, arrival: Arrival) -> None:
        sequence = Sequence(
            seq_id=number,
            prompt_token_ids=arrival.token_ids(number),
            params=_PARAMS,
            seed=0,
            max_tokens=1 if self._second else arrival.output_len,
            arrival_time=arrival.time_s,
        )
        self._lens[number] = arrival.prompt_len, arrival.output_len
        self._enter(min(self._first, key=lambda engine: engine.load_tokens), sequence)

    def _enter(self, engine: SimulatedEngine, sequence: Sequence) -> None:
        if engine.add(sequence) is not None:
            self._refused += 1
            self._sequences.pop(sequence.seq_id, None)
            self._done()
        elif engine.plan is None:
            self._go_on(engine)

    def _go_on(self, engine: SimulatedEngine) -> None:
        end = engine.start_step(self._now)
        if end is not None:
            heapq.heappush(self._events, (end, next(self._ids), engine, None))

    def _leave(self, engine: SimulatedEngine, sequence: Sequence) -> None:
        self._preemptions += sequence.num_preemptions
        first = self._sequences.pop(sequence.seq_id, None)
        if first is not None:  # it comes from a decode engine
            first.token_times += sequence.token_times
            sequence = first
        else:
            self._cached += sequence.num_cached_tokens
            prompt_len, output_len = self._lens[sequence.seq_id]
            if self._second and output_len > 1:
                self._hand_over(sequence, prompt_len, output_len)
                return
        self._timings[sequence.seq_id] = timings_of(sequence)
        self._done()

    def _hand_over(self, sequence: Sequence, prompt_len: int, output_len: int) -> None:
        assert sequence.scheduled_time is not None
        self._sequences[sequence.seq_id] = sequence
        engine = min(self._second, key=lambda engine: engine.load_tokens)
        layer_s = self._handover_s * prompt_len
        prefill_s = sequence.token_times[0] - sequence.scheduled_time
        late_s = max(layer_s, layer_s * self._num_layers - prefill_s) + self._latency_s
        moved = Sequence(
            seq_id=sequence.seq_id,
            prompt_token_ids=[*sequence.prompt_token_ids, *sequence.output_token_ids],
            params=_PARAMS,
            seed=0,
            max_tokens=output_len - 1,
            arrival_time=sequence.arrival_time,
        )
        sequence.prompt_token_ids = []  # long, and no longer needed
        heapq.heappush(self._events, (self._now + late_s, next(self._ids), engine, moved))

    def _done(self) -> None:
        if self._on_finished is not None:
            self._on_finished()

    def _result(self) -> SimulatedRun:
        engines = [*self._first, *self._second]
        terms: dict[str, float] = {}
        for engine in engines:
            engine.scheduler.check_integrity()
            for name, seconds in engine.terms.items():
                terms[name] = terms.get(name, 0.0) + seconds
        served = sorted(self._timings)
        span = self._now - (self._arrivals[0].time_s if self._arrivals else 0.0)
        busy = sum(engine.busy_s for engine in engines)
        return SimulatedRun(
            system=self._system,
            timings=tuple(self._timings[number] for number in served),
            prompt_lens=tuple(self._lens[number][0] for number in served),
            refused=self._refused,
            duration_s=span,
            terms=terms,
            meters=tuple(engine.meter for engine in engines),
            busy_share=busy / (span * len(engines)) if span else 0.0,
            peak_kv_usage=max(engine.peak_kv_usage for engine in engines),
            num_preemptions=self._preemptions,
            cached_tokens=self._cached,
        )
