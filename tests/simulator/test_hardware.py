"""Hardware files: every figure has a source, and SP levels follow the nodes."""

from __future__ import annotations

import pytest

from sps2_mega.errors import ConfigError
from sps2_mega.simulator.hardware import hardware_names, load_hardware
from tests.simulator.small_model import ROUND


@pytest.mark.parametrize("name", hardware_names())
def test_every_bundled_file_loads(name):
    hardware = load_hardware(name)
    assert hardware.gpus_per_node == 8
    assert hardware.intra_node.bytes_per_s > hardware.inter_node.bytes_per_s
    assert 1e14 < hardware.gemm_flops_per_s < hardware.peak_flops_per_s


def test_the_bundled_nodes_are_there():
    assert set(hardware_names()) == {"a100-80g", "b200", "h100", "h100-meta", "h200"}


def test_another_link_between_nodes_can_be_named():
    slow = load_hardware("h100", inter_node="ethernet-25g").inter_node
    assert slow.bytes_per_s == pytest.approx(3.125e9 * 0.9)
    with pytest.raises(ConfigError, match="'pigeon' is not a link"):
        load_hardware("h100", inter_node="pigeon")


def test_unknown_hardware_is_refused_with_the_names_that_there_are():
    with pytest.raises(ConfigError, match=r"h900.*b200"):
        load_hardware("h900")


def test_a_figure_without_a_source_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("gpu: x\npeak_flops_per_s: 1.0\nintra_node: a\ninter_node: a\nlinks: {a: {}}\n")
    with pytest.raises(ConfigError, match="needs latency_s"):
        load_hardware(str(path))
    link = "{nominal_bytes_per_s: 1.0, sources: {}}"
    path.write_text(f"gpu: x\nintra_node: a\ninter_node: a\nlinks: {{a: {link}}}\n")
    with pytest.raises(ConfigError, match="no source for nominal_bytes_per_s"):
        load_hardware(str(path))


@pytest.mark.parametrize(
    ("tp", "sp", "levels"),
    [
        (1, 1, (1,)),
        (1, 4, (4,)),
        (1, 8, (4, 2)),
        (2, 6, (2, 3)),
        (4, 3, (3,)),  # nodes are full: all SP traffic goes between them
        (8, 2, (2,)),
    ],
)
def test_sp_levels_follow_the_nodes(tp, sp, levels):
    machine = ROUND.sp_machine(tp, sp)
    assert machine.sp_levels == levels
    outer = ROUND.inter_node if tp * sp > 4 else ROUND.intra_node
    assert machine.links[-1] == outer


def test_degrees_that_tear_a_node_are_refused():
    with pytest.raises(ConfigError, match="tp=3"):
        ROUND.sp_machine(3, 1)
    with pytest.raises(ConfigError, match="sp=5"):
        ROUND.sp_machine(1, 5)


def test_impossible_figures_are_refused():
    with pytest.raises(ConfigError, match="gemm_efficiency must be <= 1"):
        ROUND.replace(gemm_efficiency=1.5)
    with pytest.raises(ConfigError, match="memory_bytes must be > 0"):
        ROUND.replace(memory_bytes=0.0)
