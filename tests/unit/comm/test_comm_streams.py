"""CommStreams hand over tensors in order and time exchanges correctly, without any peer."""

from __future__ import annotations

import time

import pytest
import torch
from torch.futures import Future

from sps2_mega.comm.comm_streams import make_comm_streams
from sps2_mega.comm.exchange import Pending


class Arrival:
    """Stand-in for torch's `Work` whose bytes arrive when the test decides."""

    def __init__(self):
        self.future = Future()

    def get_future(self):
        return self.future

    def wait(self):
        self.future.wait()


def test_on_cpu_the_end_is_when_bytes_came_not_when_somebody_waited():
    stream = make_comm_streams(torch.device("cpu")).gather
    work, taken = Arrival(), []
    in_flight = stream.launch(lambda: Pending([work], torch.ones(3), torch.zeros(3)), taken.append)
    work.future.set_result(None)
    came = time.perf_counter()
    time.sleep(0.05)  # computing
    assert not taken
    stream.land(in_flight)
    assert taken[0].tolist() == [1, 1, 1]
    assert in_flight.posted <= in_flight.finished <= came < in_flight.blocked <= in_flight.free


def test_nothing_to_exchange_is_none():
    stream = make_comm_streams(torch.device("cpu")).scatter
    assert stream.launch(lambda: None, lambda received: None) is None


def test_an_exchange_is_waited_for_once():
    work = Arrival()
    work.future.set_result(None)
    pending = Pending([work], torch.ones(1), torch.zeros(1))
    pending.wait()
    with pytest.raises(AssertionError, match="called before"):
        pending.wait()


@pytest.mark.gpu
def test_on_cuda_side_streams_and_computation_wait_for_each_other():
    device = torch.device("cuda", 0)
    streams = make_comm_streams(device)
    received = {}

    class Copied:
        def wait(self):
            """The copy is on the current stream already."""

    def post(source):
        return lambda: Pending([Copied()], source * 2, source)

    for step in range(3):
        x = torch.full((1 << 24,), float(step), device=device)
        for _ in range(20):
            x = x + 1  # still running when the exchange is posted
        streams.gather.depend()
        in_flight = streams.gather.launch(post(x), lambda y: received.update(gathered=y))
        streams.gather.land(in_flight)
        z = received["gathered"] + 1
        streams.scatter.depend()
        back = streams.scatter.launch(post(z), lambda y: received.update(returned=y))
        streams.scatter.land(back)
        result = received["returned"] + 0
        assert result[0].item() == result[-1].item() == 2 * (2 * (step + 20) + 1)
        at = streams.clock.seconds
        assert (
            at(in_flight.posted) <= at(in_flight.finished) <= at(back.posted) <= at(back.finished)
        )
        streams.clock.restart()
