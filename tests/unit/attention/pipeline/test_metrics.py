"""Hidden communication by its definition, and trace events that Perfetto can read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2_mega.attention.pipeline.metrics import CommSeconds, covered
from sps2_mega.attention.pipeline.schedule import Action, Phase, Stage
from sps2_mega.attention.pipeline.trace import TraceRecorder
from sps2_mega.comm.collectives import gather_bytes
from sps2_mega.engine.startup.tracing import TraceFile, part_path
from sps2_mega.parallel.groups import SINGLE


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9))))
def test_union_of_intervals(pairs):
    intervals = [(start, start + length) for start, length in pairs]
    assert covered(intervals) == len({i for start, end in intervals for i in range(start, end)})


def test_overlap_is_the_hidden_share():
    assert CommSeconds().overlap == 0.0
    assert CommSeconds(exposed_comm_s=1.0, total_comm_s=4.0).overlap == 0.75
    # A rank that is woken late has waited longer than the exchange took.
    assert CommSeconds(exposed_comm_s=1.1, total_comm_s=1.0).overlap == 0.0
    both = CommSeconds(exposed_comm_s=1, total_comm_s=2) + CommSeconds(total_comm_s=2)
    assert both == CommSeconds(exposed_comm_s=1, total_comm_s=4)


def gather(micro_batch, part="q"):
    return Stage(Action.WAIT, Phase.GATHER, micro_batch, part)


def test_exchanges_that_overlap_get_rows_of_their_own():
    recorder = TraceRecorder(rank=3, offset_s=-100.0)
    recorder.exchange(2, gather(0, "k"), (101.0, 102.0), (101.5, 102.0))
    recorder.exchange(2, gather(0), (101.2, 102.5), (102.0, 102.5))
    recorder.exchange(2, gather(1), (102.0, 103.0), (102.6, 102.6))
    recorder.exchange(2, Stage(Action.WAIT, Phase.SCATTER, 0), (102.6, 103.0), (103.0, 103.0))
    recorder.computed(2, Stage(Action.COMPUTE, Phase.COMPUTE, 0), (102.5, 102.6))
    events = recorder.take_events()
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    placed = {e["name"]: (rows[e["tid"]], e["ts"], e["dur"]) for e in spans}
    assert placed["k L2 m0"] == ("gather", 1e6, 1e6)
    assert placed["q L2 m0"] == ("gather (2)", 1.2e6, 1.3e6)
    assert placed["q L2 m1"] == ("gather", 2e6, 1e6)
    assert placed["out L2 m0"][0] == "scatter"
    assert placed["attention L2 m0"][0] == placed["wait: k L2 m0"][0] == "compute"
    assert {e["pid"] for e in events} == {3}
    assert recorder.take_events() == []
    recorder.step("prefill 1", (104.0, 105.0), num_tokens=7)
    later = recorder.take_events()
    assert [e["name"] for e in later] == ["thread_name", "thread_sort_index", "prefill 1"]
    assert later[-1]["args"] == {"num_tokens": 7}


def test_the_trace_of_one_rank_and_what_a_failure_leaves(tmp_path):
    path = tmp_path / "t.json"
    trace = TraceFile(path, SINGLE)
    trace.recorder.step("prefill 1", (0.0, 1.0))
    trace.flush()
    # As after a kill: a list without its end, which viewers accept.
    left = part_path(path, 0).read_text()
    assert [e["name"] for e in json.loads(left.rstrip().rstrip(",") + "]")][-1] == "prefill 1"
    trace.recorder.step("prefill 2", (1.0, 2.0))
    trace.finish()
    names = [e["name"] for e in json.loads(path.read_text())["traceEvents"]]
    assert names[-2:] == ["prefill 1", "prefill 2"]
    assert not part_path(path, 0).exists()


@pytest.mark.parametrize("payload", [b"", b"text"])
def test_bytes_of_one_rank(payload):
    assert gather_bytes(payload, SINGLE) == [payload]
