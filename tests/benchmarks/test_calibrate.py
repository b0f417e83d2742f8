"""Hardware files of calibrate.py: they load, state the origin of figures, and simulate."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.calibrate import main
from benchmarks.calibration import nodes
from benchmarks.calibration.file import hardware_text
from benchmarks.calibration.links import MeasuredLink, middle_links
from benchmarks.calibration.rates import joined, with_reduce_latency
from benchmarks.calibration.terms import Terms, terms_of
from sps2_mega.parallel.machine import Link
from sps2_mega.simulator.arrivals import Arrival
from sps2_mega.simulator.hardware import load_hardware
from sps2_mega.simulator.model_size import model_size
from sps2_mega.simulator.simulator import simulate
from sps2_mega.simulator.system import System
from tests.simulator.small_model import MODEL

FAST = MeasuredLink(latency_s=1e-5, bytes_per_s=1e10)
SLOW = MeasuredLink(latency_s=1e-3, bytes_per_s=1e8, exchange_factor=1.5, reduce_factor=0.75)


def plain(measured):
    return Link(latency_s=measured.latency_s, bytes_per_s=measured.bytes_per_s)


TERMS = Terms(
    device="abacus",
    ranks=4,
    ranks_per_node=2,
    tokens=33,
    peak_flops_per_s=1e12,
    linear_flops_per_s=8e11,
    attention_flops_per_s=5e11,
    memory_bytes=4e9,
    read_bytes_per_s=2e10,
    layer_overhead_s=1e-4,
    step_overhead_s=2e-3,
    kv_bytes_per_s=1e10,
    call_s=3e-5,
    merge_s=1e-9,
    copy_s=2e-9,
    levels=(2, 2),
    links=(FAST, SLOW),
)


def written(terms, folder, **more):
    path = folder / "mine.yaml"
    path.write_text(hardware_text(terms, model="m", command="python x", date="2026-01-01", **more))
    return str(path)


def test_measured_terms_become_hardware_and_serve_requests(tmp_path):
    hardware = load_hardware(written(TERMS, tmp_path))
    assert hardware.gemm_flops_per_s == pytest.approx(8e11)
    assert hardware.attention_flops_per_s == pytest.approx(5e11)
    assert hardware.read_bytes_per_s == pytest.approx(2e10)
    assert hardware.kv_bytes_per_s == pytest.approx(1e10)
    machine = hardware.sp_machine(1, 4)
    assert machine.sp_levels == (2, 2) and machine.links == (plain(FAST), plain(SLOW))
    assert (machine.call_s, machine.merge_s, machine.copy_s) == (3e-5, 1e-9, 2e-9)
    assert (hardware.exchange_factor, hardware.reduce_factor) == (1.5, 0.75)
    arrivals = [Arrival(time_s=0.1 * i, prompt_len=n, output_len=2) for i, n in enumerate([1, 777])]
    run = simulate(arrivals, System(name="x", sp=4), MODEL, hardware)
    assert len(run.timings) == 2 and run.refused == 0


def test_links_between_nodes_can_be_several(tmp_path):
    between = {"between-1gbit": FAST, "between-2mbit": SLOW}
    path = written(TERMS, tmp_path, between=between)
    assert load_hardware(path).inter_node == plain(FAST)
    assert load_hardware(path).exchange_factor == 1.0
    slow = load_hardware(path, inter_node="between-2mbit")
    assert (slow.inter_node, slow.exchange_factor) == (plain(SLOW), 1.5)
    assert load_hardware(path, inter_node="ethernet-25g").inter_node.bytes_per_s < 3.2e9


def test_one_rank_has_no_link_and_still_a_file(tmp_path):
    alone = dataclasses.replace(TERMS, ranks=1, ranks_per_node=1, levels=(), links=())
    hardware = load_hardware(written(alone, tmp_path))
    assert hardware.inter_node.bytes_per_s == pytest.approx(2e10)


def test_of_several_link_rates_the_middle_counts_but_for_what_a_link_carries():
    found = [
        dataclasses.replace(
            TERMS,
            peak_flops_per_s=1e12 * share,
            layer_overhead_s=1e-4 * share,
            links=(
                FAST,
                dataclasses.replace(SLOW, latency_s=1e-3 * share, bytes_per_s=1e8 / share),
            ),
        )
        for share in (1.0, 3.0, 2.0)
    ]
    terms, links = joined(found)
    assert terms == dataclasses.replace(
        TERMS,
        peak_flops_per_s=2e12,
        layer_overhead_s=2e-4,
        links=(FAST, dataclasses.replace(SLOW, latency_s=2e-3)),
    )
    assert [link.bytes_per_s for link in links] == [1e8, 1e8 / 3, 5e7]
    assert {link.latency_s for link in links} == {2e-3}
    assert terms_of(json.loads(json.dumps(dataclasses.asdict(terms)))) == terms


def test_of_several_looks_at_a_link_the_middle_counts_figure_by_figure():
    looks = [(FAST, SLOW), (FAST, dataclasses.replace(SLOW, latency_s=9.0)), (SLOW, FAST)]
    inner, outer = middle_links(looks)
    assert inner == FAST
    assert outer == dataclasses.replace(SLOW, reduce_factor=0.75, exchange_factor=1.5)
    assert middle_links([(), ()]) == ()


def test_one_rank_has_nothing_to_join_but_its_terms():
    alone = dataclasses.replace(TERMS, ranks=1, levels=(), links=())
    assert joined([alone, dataclasses.replace(alone, call_s=5e-5)]) == (
        dataclasses.replace(alone, call_s=4e-5),
        [],
    )


def test_small_sums_are_what_a_tp_step_takes_beside_all_else():
    model = dataclasses.replace(MODEL, num_layers=3, dtype="float32")
    own_s = 3 * (model_size(model).layer_params / 2e10 + 1e-4 + 3e-5) + 2e-3
    terms = with_reduce_latency(TERMS, own_s + 7 * 4e-4, model)
    assert terms.links[-1].reduce_latency_s == pytest.approx(4e-4)
    assert with_reduce_latency(TERMS, own_s, model) == TERMS, "nothing is left for sums"
    assert terms.links[:-1] == TERMS.links[:-1]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_emulated_nodes_measure_together_with_tp_and_alone_in_turn(kv_heads, monkeypatch, tmp_path):
    ran = []

    class Cluster:
        nodes = ("n0", "n1")

        def set_link(self, link):
            ran.append(link.bits_per_s)

    class Jobs:
        def __init__(self, command, output):
            assert command == ["rank"]

        def run(self, what, used):
            ran.append((what, len(used)))
            if what == nodes.TP_STEP:
                return 1.0
            links = (FAST,) if len(used) == 2 else ()
            one_node = dict(
                ranks=len(used), ranks_per_node=1, levels=(2,) * len(links), links=links
            )
            return dataclasses.asdict(dataclasses.replace(TERMS, **one_node))

    monkeypatch.setattr(nodes, "emulated_cluster", lambda count: nullcontext(Cluster()))
    monkeypatch.setattr(nodes, "_Jobs", Jobs)
    probe = dataclasses.replace(MODEL, num_kv_heads=kv_heads, dtype="float32")
    *_, last = nodes.on_emulated_nodes(2, [1e9, None], ["rank"], probe, with_one_rank=True)
    tp = [("tp-step", 2)] if kv_heads == 4 else []  # the probe's heads cannot always be dealt
    turn = [("terms", 2), *tp, ("terms", 1)]
    assert ran == [1e9, *turn, None, *turn]
    assert list(last.between) == ["between-1gbit", "between-free"]
    assert last.alone.links == () and last.alone.ranks == 1
    assert (last.terms.links[-1].reduce_latency_s > 0.1) == bool(tp)
    assert load_hardware(written(last.terms, tmp_path, between=last.between)).reduce_factor == 1.0


def test_every_figure_says_how_and_when(tmp_path):
    text = Path(written(TERMS, tmp_path)).read_text()
    assert text.count("measured, python x, 2026-01-01") >= 12 + 2 * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.json"], "must end in .yaml"),
        (["--output", "x.yaml", "--one-rank", "y.txt", "--nodes", "2"], "must end in .yaml"),
        (["--output", "x.yaml", "--one-rank", "y.yaml"], "goes with --nodes"),
        (["--output", "x.yaml", "--tokens", "1"], "--tokens must be >= 2"),
        (["--output", "x.yaml", "--nodes", "1"], "--nodes must be at least 2"),
        (["--output", "x.yaml", "--nodes", "2", "--rates", "fast"], "a link rate is"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
