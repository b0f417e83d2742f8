"""Runs the stages of one attention layer: posts, waits, computes, and notes when each exchange was
under way.

    pipeline = Pipeline(make_comm_streams(device), back=groups.sp_back, settings=...)     once per engine
    pipeline.run(stage_order(...), work, layer)             per layer; `work` knows the tensors
    pipeline.end_step("prefill 7", began)                   per step

The order is `order`'s, what travels and is computed is the transport's (a `PipelineWork`), streams
and clocks are `comm.streams`'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sps2_mega.attention.pipeline.metrics import CommSeconds, Interval, covered
from sps2_mega.attention.pipeline.schedule import Action, Phase, Stage
from sps2_mega.attention.pipeline.settings import PIPELINE_OFF, PipelineSettings
from sps2_mega.attention.pipeline.trace import TraceRecorder
from sps2_mega.comm.comm_streams import CommStreams, InFlight, make_comm_streams
from sps2_mega.comm.exchange import Pending
from sps2_mega.parallel.groups import Group


class PipelineWork(Protocol):
    """One layer's tensors. It must keep what it posted and received until `run` returns.

    Posts happen in the same order on every rank. One with nothing to exchange on any rank (a group
    of one) returns None, has then done what `arrived` or `returned` would do, and is not waited
    for. On CUDA posts, `arrived` and `returned` run on side streams, right after each other.
    """

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        """Sends this rank's share of an input and asks for the others'."""
        ...

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        """Takes an input that has come in; called before `compute` of that micro-batch."""
        ...

    def compute(self, micro_batch: int) -> None:
        """Works on a micro-batch whose inputs have arrived."""
        ...

    def post_scatter(self, micro_batch: int) -> Pending | None:
        """Sends the results of a micro-batch back, over the group of the way back."""
        ...

    def returned(self, micro_batch: int, received: Tensor) -> None:
        """Takes results of this rank's queries."""
        ...


class Pipeline:
    """Runs layers and adds up their communication until `take_seconds`. `back` is the group for the
    way back; None: transports use the one they have for both ways, which is right but overlaps
    less."""

    def __init__(
        self,
        streams: CommStreams,
        back: Group | None = None,
        *,
        settings: PipelineSettings = PIPELINE_OFF,
        trace: TraceRecorder | None = None,
    ) -> None:
        self.back, self.settings = back, settings
        self._clock = streams.clock
        self._streams = {Phase.GATHER: streams.gather, Phase.SCATTER: streams.scatter}
        self._trace = trace
        self._flown: list[tuple[int, Stage, InFlight]] = []
        self._computed: list[tuple[int, Stage, Any, Any]] = []  # only while tracing

    def run(self, stages: Sequence[Stage], work: PipelineWork, layer: int) -> None:
        """All of `stages` in order; afterwards nothing is under way."""
        self._streams[Phase.GATHER].depend()
        in_flight: dict[tuple[Phase, int, str], InFlight | None] = {}
        for stage in stages:
            key = (stage.phase, stage.micro_batch, stage.part)
            if stage.action is Action.POST:
                in_flight[key] = self._launch(stage, work)
            elif stage.action is Action.WAIT:
                flight = in_flight[key]
                if flight is not None:
                    self._streams[stage.phase].land(flight)
                    self._flown.append((layer, stage, flight))
            else:
                self._compute(stage, work, layer)
        for flight in in_flight.values():
            if flight is not None:
                flight.forget()

    def end_step(self, name: str, began: float, **facts: int) -> CommSeconds:
        """Communication of the step that began at `began` (of `time.perf_counter()`) and ends now.
        On CUDA it waits for the last exchange. `facts` are shown with the step in the trace."""
        seconds = self.take_seconds()
        if self._trace is not None:
            self._trace.step(name, (began, time.perf_counter()), overlap=seconds.overlap, **facts)
        return seconds

    def take_seconds(self) -> CommSeconds:
        """Communication since the last call or step."""
        in_flight: list[Interval] = []
        exposed = 0.0
        at = self._clock.seconds
        for layer, stage, flight in self._flown:
            flown = (at(flight.posted), at(flight.finished))
            blocked = (at(flight.blocked), at(flight.free))
            in_flight.append(flown)
            exposed += blocked[1] - blocked[0]
            if self._trace is not None:
                self._trace.exchange(layer, stage, flown, blocked)
        if self._trace is not None:
            for layer, stage, began, ended in self._computed:
                self._trace.computed(layer, stage, (at(began), at(ended)))
        self._flown.clear()
        self._computed.clear()
        self._clock.restart()
        return CommSeconds(exposed_comm_s=exposed, total_comm_s=covered(in_flight))

    def _launch(self, stage: Stage, work: PipelineWork) -> InFlight | None:
        m, part, stream = stage.micro_batch, stage.part, self._streams[stage.phase]
        if stage.phase is Phase.GATHER:
            return stream.launch(
                lambda: work.post_gather(m, part), lambda received: work.arrived(m, part, received)
            )
        stream.depend()
        return stream.launch(
            lambda: work.post_scatter(m), lambda received: work.returned(m, received)
        )

    def _compute(self, stage: Stage, work: PipelineWork, layer: int) -> None:
        if self._trace is None:
            work.compute(stage.micro_batch)
            return
        began = self._clock.mark()
        work.compute(stage.micro_batch)
        self._computed.append((layer, stage, began, self._clock.mark()))


def plain_pipeline(device: torch.device) -> Pipeline:
    """Without overlap: one micro-batch at a time."""
    return Pipeline(make_comm_streams(device))
