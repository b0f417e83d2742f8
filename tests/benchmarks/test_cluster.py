import dataclasses
import json
import os
import signal
import sys

import pytest

from benchmarks import cluster
from benchmarks.emulated.figures import (
    Sample,
    balanced_rate,
    end_share,
    hidden_of_hideable,
    middle_of,
    paired,
    stages_of,
    summary,
)
from benchmarks.emulated.jobs import rank_environment
from benchmarks.emulated.measure import prompt
from benchmarks.emulated.nodes import (
    ClusterError,
    Link,
    Node,
    exit_on_sigterm,
    parse_rate,
    parse_rates,
    rate_name,
    require_means,
    shaping_commands,
)
from benchmarks.emulated.result import Run, at_rate, result_of
from benchmarks.emulated.systems import SHAPES, named, systems
from sps2_mega.config_mapping import engine_config_from_mapping
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.serving.llm import engine_config

CSA = {"degrees": (1, 4), "spans": (125,)}


def test_rates_are_read_as_tc_writes_them():
    assert parse_rate("10gbit") == 1e10
    assert parse_rate("62.5mbit") == 62.5e6
    assert parse_rate("800kbit") == 8e5
    assert parse_rate("free") is None
    for rate in ("10gbit", "62.5mbit", "0.8mbit", "free"):
        assert parse_rate(rate_name(parse_rate(rate))) == parse_rate(rate)
    assert parse_rates(["1gbit", "free", "10gbit", "1000mbit"]) == [None, 1e10, 1e9]


@pytest.mark.parametrize("text", ["10", "fast", "-1mbit", "0gbit", "mbit"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ValueError):
        parse_rate(text)


def test_a_free_link_is_not_shaped_at_all():
    assert shaping_commands("uplink", Link()) == []


def test_a_slow_link_still_lets_whole_segments_pass():
    [command] = shaping_commands("uplink", Link(bits_per_s=1e6))
    assert command[:6] == ["qdisc", "replace", "dev", "uplink", "root", "handle"]
    assert command[command.index("rate") + 1] == "1000000bit"
    assert command[command.index("burst") + 1] == str(64 * 1024)
    [fast] = shaping_commands("uplink", Link(bits_per_s=1e10))
    assert int(fast[fast.index("burst") + 1]) == 1_250_000


def test_latency_comes_before_the_rate():
    delay, rate = shaping_commands("uplink", Link(bits_per_s=1e9, latency_s=0.0005))
    assert delay[delay.index("delay") + 1] == "500us" and "root" in delay
    assert rate[rate.index("parent") + 1] == "1:1"


def test_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(f"{require_means.__module__}.shutil.which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(sys, "argv", ["cluster.py"])
    assert cluster.main() == 2
    assert "need root" in capsys.readouterr().err
    monkeypatch.setattr(f"{require_means.__module__}.shutil.which", lambda name: None)
    with pytest.raises(ClusterError, match="ip and tc not found: iproute2 is needed"):
        require_means()


def test_sigterm_raises_inside_a_cluster_and_its_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_system_has_a_valid_configuration():
    for nodes in (2, 4):
        for system in systems(chunk_sizes=[300], csa=CSA):
            config = engine_config(
                "sps2-tiny", **system.degrees(nodes), options=dict(system.options)
            )
            ranks = config.parallel.tp * config.parallel.sp
            assert ranks == (1 if system.layout == "one" else nodes)
            assert config.csa.exact == (system.answer == "dense")
            sent = json.loads(json.dumps(dataclasses.asdict(config)))
            assert engine_config_from_mapping(sent) == config


def test_each_answer_is_given_first_by_one_rank():
    first = {}
    for system in systems(chunk_sizes=[64, 128], csa=CSA):
        first.setdefault(system.answer, system.layout)
    assert first == {"dense": "one", "csa": "one"}


def test_unknown_names_are_refused_with_the_known_ones():
    assert named("mha,gqa", SHAPES, "shape") == ["mha", "gqa"]
    with pytest.raises(ValueError, match="unknown shape gpt; known are gqa, mha, wide, sps2-tiny"):
        named("gqa,gpt", SHAPES, "shape")


def test_ranks_are_told_apart_as_nodes():
    nodes = [Node(f"n{i}", f"10.78.0.{i + 1}") for i in range(3)]
    info = from_environment(rank_environment(2, nodes, 1234))
    assert (info.rank, info.world_size, info.node_rank, info.local_world_size) == (2, 3, 2, 1)
    assert (info.master_addr, info.master_port) == ("10.78.0.1", 1234)
    alone = from_environment(rank_environment(0, nodes[:1], 1234))
    assert (alone.world_size, alone.launcher) == (1, "none")


def sample(ttft_s, comm_s=0.0, **rest):
    return Sample(ttft_s=ttft_s, exposed_comm_s=comm_s, total_comm_s=comm_s, **rest)


def test_balance_lies_where_communication_equals_computation():
    # 2 s of computation, 1e8 bits: equal at 5e7 bits per second.
    samples = {rate: sample(2 + 1e8 / rate, 1e8 / rate) for rate in (1e9, 1e8, 1e7)}
    assert balanced_rate(samples) == pytest.approx(5e7, rel=1e-6)
    assert balanced_rate({5e7: samples[1e8]}) is None
    assert balanced_rate({1e9: samples[1e9], 1e8: samples[1e8]}) is None, "always too fast"
    assert balanced_rate({1e7: samples[1e7], 1e6: sample(102, 100)}) is None, "always too slow"


def test_ends_of_a_pipeline_are_what_nothing_can_hide():
    whole = sample(1.0, head_groups=1, query_parts=1)
    shape = {"num_heads": 8, "num_kv_heads": 8, "ranks": 2}
    assert end_share(whole, **shape, tokens=1000) == pytest.approx(1.0)
    by_heads = sample(1.0, head_groups=4, query_parts=1)
    assert end_share(by_heads, **shape, tokens=1000) == pytest.approx(0.25)
    # 1 KV head per rank: keys and values come as a whole, 4 of 20 rows, and a part of the queries.
    cut = sample(1.0, head_groups=1, query_parts=8)
    share = end_share(cut, num_heads=8, num_kv_heads=2, ranks=2, tokens=4096)
    assert 4 / 20 < share < 4 / 20 + 16 / 20 / 4
    assert end_share(cut, num_heads=8, num_kv_heads=1, ranks=4, tokens=1) > 0, "three empty ranks"


def test_hidden_is_bounded_by_the_computation_too():
    plain = sample(3.0, 1.0, attention_s=2.0)
    pipelined = Sample(ttft_s=2.2, exposed_comm_s=0.25, total_comm_s=1.1)
    assert hidden_of_hideable(plain, pipelined, 0.25) == pytest.approx(1.0)
    assert hidden_of_hideable(plain, pipelined, 0.0) == pytest.approx(0.75)
    short = sample(1.5, 1.0, attention_s=0.5)
    waits = Sample(ttft_s=1.0, exposed_comm_s=0.6, total_comm_s=1.1)
    assert hidden_of_hideable(short, waits, 0.25) == pytest.approx(0.8)


def stage(category, name, micro_batch, seconds):
    facts = {"layer": 0, "micro_batch": micro_batch}
    return {"cat": category, "name": name, "dur": seconds * 1e6, "args": facts}


def test_stages_tell_attention_and_the_cut():
    events = [{"name": "process_name", "ph": "M", "args": {"name": "rank 0"}}]
    for m in range(6):
        events.append(stage("gather", f"q L0 m{m}", m, 0.5))
        events.append(stage("wait", f"wait: q L0 m{m}", m, 0.1))
        events.append(stage("compute", f"attention L0 m{m}", m, 0.25))
    events += [stage("gather", f"k L0 m{m}", m, 1.0) for m in (0, 3)]
    assert stages_of(events) == {"attention_s": 1.5, "head_groups": 2, "query_parts": 3}
    assert stages_of([]) == {"attention_s": 0.0, "head_groups": 0, "query_parts": 0}


def test_middle_and_pairs():
    slow = [sample(4.0), sample(9.0), sample(8.0)]
    fast = [sample(1.0), sample(3.0), sample(2.0)]
    assert middle_of(slow).ttft_s == 8.0
    assert paired(slow, fast) == 4.0
    assert summary(slow) == {"ttft_s": 8.0, "ttft_range_s": [4.0, 9.0]}
    assert summary([Sample(ttft_s=2, exposed_comm_s=1, total_comm_s=4)])["overlap"] == 0.75


def test_a_result_holds_every_curve_and_compares_at_balance():
    run = Run(shape=SHAPES["gqa"], tokens=1000, systems=[], balance=1e8)
    cut = {"attention_s": 1.0, "head_groups": 1, "query_parts": 4}
    times = {"tp": 6.0, "ulysses": 4.0, "ulysses-pipelined": 3.0, "csa-pipelined": 1.5}
    for name, seconds in times.items():
        run.samples[name] = {rate: [sample(seconds, 1.0, **cut)] for rate in (1e8, 1e7)}
    here = at_rate(run, 1e8, ranks=2)
    assert here["ulysses ttft, pipelined / plain"] == 0.75
    assert here["ttft tp / csa-pipelined"] == 4.0
    result = json.loads(json.dumps(result_of(run, ranks=2)))
    assert set(result["curves"]["tp"]) == {"100mbit", "10mbit"}
    assert result["balanced_rate"] == "100mbit"
    assert result["compared"]["100mbit"]["ttft tp / csa-pipelined"] == 4.0


def test_prompts_are_the_same_for_all_and_differ_between_repeats():
    assert prompt(50, 7, seed=1) == prompt(50, 7, seed=1) != prompt(50, 7, seed=2)
    assert max(prompt(500, 7, seed=1)) == 6
