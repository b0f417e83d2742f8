"""Where exchanges of one direction run beside the computation, and when they were under way.

    stream.depend()                           # what is posted from here on may use what is computed up to here
    flight = stream.launch(post, arrived)     # post() -> Pending; arrived(tensor) unpacks what came
    ... compute ...
    stream.land(flight)                       # what arrived can be read from here on

On CPU gloo's threads move the bytes; packing happens in `launch`, unpacking in `land`. On CUDA all
of it happens on a side stream, and `land` makes the computing stream wait for an event; the program
itself never waits. Whatever a flight touches must stay referenced until all of its layer has
landed: streams then never reuse memory too early.
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
    """Marks are moments in the order of the work of the current stream, cheap to make and read
    later."""

    def mark(self) -> Any: ...

    def seconds(self, mark: Any) -> float:
        """On the clock of `time.perf_counter()`; on CUDA it waits until the device is there."""
        ...

    def restart(self) -> None:
        """Marks made before cannot be read any more; to be called now and then, as between
        steps."""
        ...


@dataclass(slots=True)
class InFlight:
    """Marks of an exchange: under way from `posted` to `finished`, waited for from `blocked` to
    `free`."""

    pending: Pending | None
    arrived: Arrived | None
    posted: Any = None
    finished: Any = None
    blocked: Any = None
    free: Any = None

    def forget(self) -> None:
        """Drops the tensors; marks stay."""
        self.pending = self.arrived = None


class CommStream(Protocol):
    def depend(self) -> None: ...

    def launch(self, post: Post, arrived: Arrived) -> InFlight | None:
        """Starts an exchange; None where `post` had nothing to exchange."""
        ...

    def land(self, flight: InFlight) -> None:
        """Once per flight, in the order of launching."""
        ...


@dataclass(frozen=True, slots=True)
class CommStreams:
    """Both directions, and the clock of the computation between them."""

    gather: CommStream
    scatter: CommStream
    clock: Clock


class CpuClock:
    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark

    def restart(self) -> None:
        """Any two moments can be compared."""


class CpuCommStream:
    def depend(self) -> None:
        """What was computed is there."""

    def launch(self, post: Post, arrived: Arrived) -> InFlight | None:
        pending = post()
        return None if pending is None else InFlight(pending, arrived, posted=pending.posted_at)

    def land(self, flight: InFlight) -> None:
        assert flight.pending is not None and flight.arrived is not None, "landed before"
        flight.blocked = time.perf_counter()
        received = flight.pending.wait()
        flight.free = time.perf_counter()
        flight.finished = flight.pending.finished_at
        flight.arrived(received)
        flight.forget()


class CudaClock:
    """Reads events relative to one moment at which both clocks were read. Distances of events are
    float32 milliseconds: an hour after that moment they would be good to 0.2 ms only, hence
    `restart`."""

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
        # A post that exchanges nothing may have copied; whoever computes next must see that.
        torch.cuda.current_stream().wait_stream(self._stream)
        return None

    def land(self, flight: InFlight) -> None:
        flight.blocked = self._clock.mark()
        torch.cuda.current_stream().wait_event(flight.finished)
        flight.free = self._clock.mark()


def make_comm_streams(device: torch.device) -> CommStreams:
    """CommStreams of the computing device: gloo's threads on CPU, two side streams on CUDA."""
    if device.type != "cuda":
        return CommStreams(CpuCommStream(), CpuCommStream(), CpuClock())
    clock = CudaClock(device)
    return CommStreams(CudaCommStream(device, clock), CudaCommStream(device, clock), clock)
