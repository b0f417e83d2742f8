"""Streams on which exchanges of one direction overlap with computation, and their timing.

    stream.depend()                           # later posts may read what is computed up to here
    in_flight = stream.launch(post, arrived)  # post() -> Pending; arrived(tensor) unpacks the data
    ... compute ...
    stream.land(in_flight)                    # received data can be read from here on

On CPU, gloo's threads move the bytes; packing happens in `launch`, unpacking in `land`. On CUDA
everything runs on a side stream, and `land` makes the computing stream wait for an event; the
program itself never waits. Tensors that an exchange touches must stay referenced until all
exchanges of their layer have landed, so that streams never reuse memory too early.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sps2_mega.comm.exchange import Pending

Post = Callable[[], Pending | None]
Arrived = Callable[[Tensor], None]


class Clock(Protocol):
    """Marks of moments in the current stream's order of work, cheap to record and read later."""

    def mark(self) -> Any: ...

    def seconds(self, mark: Any) -> float:
        """Time of a mark on the clock of `time.perf_counter()`; on CUDA, wait for the mark."""
        ...

    def restart(self) -> None:
        """Invalidate all earlier marks; call it now and then, for example between steps."""
        ...


@dataclass(slots=True)
class InFlight:
    """Marks of one exchange: in flight `posted` to `finished`, waited for `blocked` to `free`."""

    pending: Pending | None
    arrived: Arrived | None
    posted: Any = None
    finished: Any = None
    blocked: Any = None
    free: Any = None

    def forget(self) -> None:
        """Drop the tensors; the marks stay."""
        self.pending = self.arrived = None


class CommStream(Protocol):
    def depend(self) -> None: ...

    def launch(self, post: Post, arrived: Arrived) -> InFlight | None:
        """Start an exchange; None if `post` had nothing to exchange."""
        ...

    def land(self, in_flight: InFlight) -> None:
        """Wait for an exchange; call it once per exchange, in the order of launching."""
        ...


@dataclass(frozen=True, slots=True)
class CommStreams:
    """The streams of both directions, and the clock of the computation between them."""

    gather: CommStream
    scatter: CommStream
    clock: Clock


class CpuClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark

    def restart(self) -> None:
        """Do nothing: any two marks can be compared."""


class CpuCommStream:
    def depend(self) -> None:
        """Do nothing: computed tensors are ready."""

    def launch(self, post: Post, arrived: Arrived) -> InFlight | None:
        pending = post()
        return None if pending is None else InFlight(pending, arrived, posted=pending.posted_at)

    def land(self, in_flight: InFlight) -> None:
        assert in_flight.pending is not None and in_flight.arrived is not None, "landed before"
        in_flight.blocked = time.perf_counter()
        received = in_flight.pending.wait()
        in_flight.free = time.perf_counter()
        in_flight.finished = in_flight.pending.finished_at
        in_flight.arrived(received)
        in_flight.forget()


class CudaClock:
    """Event times relative to one moment at which both clocks were read.

    Distances of events are float32 milliseconds: an hour after that moment they would
    be accurate to 0.2 ms only, hence `restart`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        with torch.cuda.device(self._device):
            self._zero = self.mark()
            self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: torch.cuda.Event) -> float:
        mark.synchronize()
        return self._zero_s + self._zero.elapsed_time(mark) / 1e3


class CudaCommStream:
    """One side stream. All methods are called with the computing stream current."""

    def __init__(self, device: torch.device, clock: CudaClock) -> None:
        self._stream = torch.cuda.Stream(device)
        self._clock = clock

    def depend(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def launch(self, post: Post, arrived: Arrived) -> InFlight | None:
        with torch.cuda.stream(self._stream):
            posted = self._clock.mark()
            pending = post()
            if pending is not None:
                arrived(pending.wait())
                finished = self._clock.mark()
                return InFlight(pending, arrived, posted=posted, finished=finished)
        # A post that exchanges nothing may have copied; the next computation must see the copy.
        torch.cuda.current_stream().wait_stream(self._stream)
        return None

    def land(self, in_flight: InFlight) -> None:
        in_flight.blocked = self._clock.mark()
        torch.cuda.current_stream().wait_event(in_flight.finished)
        in_flight.free = self._clock.mark()


def make_comm_streams(device: torch.device) -> CommStreams:
    """Communication streams of a device: gloo's threads on CPU, two side streams on CUDA."""
    if device.type != "cuda":
        return CommStreams(CpuCommStream(), CpuCommStream(), CpuClock())
    clock = CudaClock(device)
    return CommStreams(CudaCommStream(device, clock), CudaCommStream(device, clock), clock)
