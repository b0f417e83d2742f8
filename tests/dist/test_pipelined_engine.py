"""A pipelined prefill gives the tokens of one rank, and a trace of all ranks."""

from __future__ import annotations

import itertools
import json

import families
import pytest
from engine_run import assert_same, run_engine
from harness import RankError, free_port, run_ranks

PROMPTS = (1, 333, 40, 127)


@pytest.fixture(scope="module")
def requests():
    return [
        (prompt, dict(max_tokens=4, temperature=0.0))
        for prompt in families.prompts(PROMPTS, seed=5)
    ]


@pytest.fixture(scope="module")
def one_rank(model, requests):
    return run_engine(model, requests)


def test_one_rank_without_anything_to_send_may_be_cut_too(model, requests, one_rank):
    options = model | dict(pipeline="on", micro_batches=6)
    assert_same(run_engine(options, requests), one_rank)


@pytest.mark.parametrize(
    ("tp", "sp", "options"),
    [
        (2, 2, dict(transport="ulysses", pipeline="on", micro_batches=5)),
        (1, 3, dict(transport="gather", pipeline="on")),
        (1, 4, dict(transport="ring", pipeline="on")),
    ],
)
def test_many_ranks_equal_one_and_are_traced(model, requests, one_rank, tmp_path, tp, sp, options):
    path = tmp_path / "trace.json"
    outputs = run_engine(model | options | dict(trace=str(path)), requests, tp=tp, sp=sp)
    assert_same(outputs, one_rank)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]  # no parts are left
    check_trace(json.loads(path.read_text())["traceEvents"], num_ranks=tp * sp)


def check_trace(events, *, num_ranks):
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) + sum(event["ph"] == "M" for event in events) == len(events)
    assert {event["pid"] for event in spans} == set(range(num_ranks))
    rows = {}
    for event in spans:
        rows.setdefault((event["pid"], event["tid"]), []).append(event)
    assert set(rows) == set(names)
    for rank in range(num_ranks):
        own = {names[key] for key in rows if key[0] == rank}
        assert {"steps", "compute", "gather"} <= own, own
    for (_, row), found in rows.items():
        for before, after in itertools.pairwise(sorted(found, key=lambda e: e["ts"])):
            # Perfetto draws a row only if its events do not overlap.
            assert after["ts"] >= before["ts"] + before["dur"] - 0.002, (row, before, after)
    steps = [
        sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in spans if e["cat"] == "step" and e["pid"] == rank
        )
        for rank in range(num_ranks)
    ]
    assert len({len(own) for own in steps}) == 1 and steps[0]
    for together in zip(*steps, strict=True):
        # The ranks of a step meet in exchanges, so on one clock their steps have a moment in
        # common.
        assert max(start for start, _ in together) < min(end for _, end in together)
    first, last = steps[0][0][0], steps[0][-1][1]
    assert all(first - 1e6 < event["ts"] < last + 1e6 for event in spans)


def stats_on_rank(rank, port, options, prompt):
    import os

    from sps2_mega.config import EngineConfig, ParallelConfig
    from sps2_mega.engine.start import driver_of, worker_of
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.parallel.launcher import from_environment
    from sps2_mega.types import SamplingParams

    os.environ["MASTER_PORT"] = str(port)
    config = EngineConfig(parallel=ParallelConfig(sp=2), **options)
    started = start_rank(config, from_environment(), show_progress=False)
    if rank > 0:
        worker_of(started).run()
        return None
    engine = driver_of(started)
    engine.add_request("a", prompt, SamplingParams(max_tokens=2))
    engine.step()
    after_prefill = engine.stats().prefill_comm
    while engine.has_work():
        engine.step()
    after_decode = engine.stats().prefill_comm
    engine.shutdown()
    return after_prefill, after_decode


@pytest.mark.parametrize("transport", ["ulysses", "gather", "ring"])
def test_communication_of_prefill_is_counted_and_decode_adds_none(model, transport):
    prompt = families.prompts((200,), seed=1)[0]
    options = model | dict(transport=transport)
    after_prefill, after_decode = run_ranks(stats_on_rank, 2, free_port(), options, prompt)[0]
    assert after_prefill.total_comm_s > 0 and after_prefill.exposed_comm_s > 0
    assert after_decode == after_prefill


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(micro_batches=0), "micro_batches must be at least 1, got 0"),
        (dict(pipeline="off", micro_batches=2), "micro_batches=2"),
        (dict(trace="no/such/folder/t.json"), "no folder no/such/folder"),
        (dict(trace="."), "is a folder"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(model, requests, options, message):
    with pytest.raises(RankError, match=message):
        run_engine(model | options, requests)
