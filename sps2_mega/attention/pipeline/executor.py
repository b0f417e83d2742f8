"""Run the stages of one attention layer: post, wait, compute, and note when exchanges ran.

    pipeline = Pipeline(make_comm_streams(device), back=groups.sp_back, settings=...)     per engine
    pipeline.run(stage_order(...), tensors, layer)                                        per layer
    pipeline.end_step("prefill 7", began)                                                 per step

`schedule` decides the order, the transport what travels and what is computed (`PipelinedLayer`),
`comm.comm_streams` where exchanges run and which clock is read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from sps2_mega.attention.pipeline.metrics import CommSeconds, Interval, covered
from sps2_mega.attention.pipeline.schedule import Action, Phase, Stage
from sps2_mega.attention.pipeline.settings import PIPELINE_OFF, PipelineSettings
from sps2_mega.comm.comm_streams import CommStreams, InFlight, make_comm_streams

if TYPE_CHECKING:
    import torch

    from sps2_mega.attention.pipeline.trace import TraceRecorder
    from sps2_mega.comm.exchange import Pending
    from sps2_mega.parallel.groups import Group


class PipelinedLayer(Protocol):
    """Tensors of one layer whose results stay where they are computed.

    It must keep what it posted and received until `run` returns. Posts happen in the same order on
    every rank. A post with nothing to exchange on any rank (a group of one) returns None, has then
    done what `arrived` or `returned` would do, and is not waited for. On CUDA posts, `arrived` and
    `returned` run on side streams, right after each other.
    """

    def post_gather(self, micro_batch: int, part: str) -> Pending | None:
        """Send this rank's share of an input and ask for the others'."""
        ...

    def arrived(self, micro_batch: int, part: str, received: Tensor) -> None:
        """Take an input that has arrived, before `compute` of that micro-batch."""
        ...

    def compute(self, micro_batch: int) -> None:
        """Compute a micro-batch whose inputs have arrived."""
        ...


class ReturningLayer(PipelinedLayer, Protocol):
    """Tensors of one layer whose results travel back to the ranks of the queries."""

    def post_scatter(self, micro_batch: int) -> Pending | None:
        """Send the results of a micro-batch back, over the group of the way back."""
        ...

    def returned(self, micro_batch: int, received: Tensor) -> None:
        """Take results of this rank's queries."""
        ...


class Pipeline:
    """Runner of pipelined layers; adds up their communication until `take_seconds`.

    `back` is the group for the way back. With None, transports use their one group for both ways,
    which is right but overlaps less.
    """

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
        self._landed: list[tuple[int, Stage, InFlight]] = []
        self._computed: list[tuple[int, Stage, Any, Any]] = []  # only while tracing

    def run(self, stages: Sequence[Stage], tensors: PipelinedLayer, layer: int) -> None:
        """Run all `stages` in order; afterwards nothing is in flight.

        Stages that return results take a `ReturningLayer`.
        """
        self._streams[Phase.GATHER].depend()
        in_flight: dict[tuple[Phase, int, str], InFlight | None] = {}
        for stage in stages:
            key = (stage.phase, stage.micro_batch, stage.part)
            if stage.action is Action.POST:
                in_flight[key] = self._launch(stage, tensors)
            elif stage.action is Action.WAIT:
                exchange = in_flight[key]
                if exchange is not None:
                    self._streams[stage.phase].land(exchange)
                    self._landed.append((layer, stage, exchange))
            else:
                self._compute(stage, tensors, layer)
        for exchange in in_flight.values():
            if exchange is not None:
                exchange.forget()

    def end_step(self, name: str, began: float, **facts: int) -> CommSeconds:
        """Return the communication of the step that began at `began` and ends now.

        `began` is a time of `time.perf_counter()`. On CUDA it waits for the last exchange. `facts`
        are shown with the step in the trace.
        """
        seconds = self.take_seconds()
        if self._trace is not None:
            self._trace.step(name, (began, time.perf_counter()), overlap=seconds.overlap, **facts)
        return seconds

    def take_seconds(self) -> CommSeconds:
        """Return the communication since the last call or step."""
        in_flight: list[Interval] = []
        exposed = 0.0
        at = self._clock.seconds
        for layer, stage, exchange in self._landed:
            under_way = (at(exchange.posted), at(exchange.finished))
            blocked = (at(exchange.blocked), at(exchange.free))
            in_flight.append(under_way)
            exposed += blocked[1] - blocked[0]
            if self._trace is not None:
                self._trace.exchange(layer, stage, under_way, blocked)
        if self._trace is not None:
            for layer, stage, began, ended in self._computed:
                self._trace.computed(layer, stage, (at(began), at(ended)))
        self._landed.clear()
        self._computed.clear()
        self._clock.restart()
        return CommSeconds(exposed_comm_s=exposed, total_comm_s=covered(in_flight))

    def _launch(self, stage: Stage, tensors: PipelinedLayer) -> InFlight | None:
        m, part, stream = stage.micro_batch, stage.part, self._streams[stage.phase]
        if stage.phase is Phase.GATHER:
            return stream.launch(
                lambda: tensors.post_gather(m, part),
                lambda received: tensors.arrived(m, part, received),
            )
        returning = cast("ReturningLayer", tensors)  # only such a layer has scatter stages
        stream.depend()
        return stream.launch(
            lambda: returning.post_scatter(m), lambda received: returning.returned(m, received)
        )

    def _compute(self, stage: Stage, tensors: PipelinedLayer, layer: int) -> None:
        if self._trace is None:
            tensors.compute(stage.micro_batch)
            return
        began = self._clock.mark()
        tensors.compute(stage.micro_batch)
        self._computed.append((layer, stage, began, self._clock.mark()))


def plain_pipeline(device: torch.device) -> Pipeline:
    """Make a pipeline without overlap: one micro-batch at a time."""
    return Pipeline(make_comm_streams(device))
