"""Default SP threshold: slow links raise it, slow arithmetic lowers it."""

from sps2_mega.attention.planner.exact import TRANSPORTS
from sps2_mega.attention.planner.step_planner import PrefillPlanner
from sps2_mega.engine.startup.sp_threshold import auto_threshold
from sps2_mega.parallel.machine import Link, Machine
from sps2_mega.scheduler.layer_flops import LayerFlops


def threshold(*, latency_s=1e-4, bytes_per_s=1e9, flops_per_s=1e11):
    machine = Machine(
        sp_levels=(2,),
        links=(Link(latency_s=latency_s, bytes_per_s=bytes_per_s),),
        flops_per_s=flops_per_s,
    )
    planner = PrefillPlanner(
        machine=machine,
        candidates=TRANSPORTS,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        itemsize=4,
        window=None,
        overlap=True,
        log_choices=False,
    )
    work = LayerFlops(num_layers=4, token_flops=1_200_000, pair_flops=1024)
    return auto_threshold(planner, work, block_size=16, sp_size=2, tp_size=1)


def test_what_travels_slowly_stays_on_one_rank():
    usual = threshold()
    assert threshold(latency_s=1e-2) > usual
    assert threshold(latency_s=1e-7, bytes_per_s=1e12) <= usual
    assert threshold(flops_per_s=1e9) <= usual <= threshold(flops_per_s=1e13)


def test_the_threshold_is_bounded_whatever_the_links():
    assert threshold(latency_s=100.0) == 2**15
    assert threshold(latency_s=0.0, bytes_per_s=1e18) == 32
