"""calibrate.py on real ranks: what it measures makes a hardware file that the simulator takes."""

from __future__ import annotations

import os

import pytest
from harness import free_port, run_ranks


def calibrate_on_rank(rank, port, output):
    from benchmarks import calibrate
    from benchmarks.calibration import timer

    timer.LONG_ENOUGH_S = 0.05  # figures need not be steady here
    os.environ["MASTER_PORT"] = str(port)
    arguments = ["--output", output, "--model", "gqa", "--tokens", "65", "--device", "cpu"]
    return calibrate.main(arguments)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_machine_is_measured_and_simulated(tmp_path, ranks):
    from benchmarks.calibrate import model_of
    from sps2_mega.simulator.arrivals import Arrival
    from sps2_mega.simulator.hardware import load_hardware
    from sps2_mega.simulator.simulator import simulate
    from sps2_mega.simulator.system import System

    output = tmp_path / "measured.yaml"
    assert run_ranks(calibrate_on_rank, ranks, free_port(), str(output)) == [0] * ranks
    hardware = load_hardware(str(output))
    assert hardware.gpus_per_node == ranks
    assert 1e7 < hardware.gemm_flops_per_s <= hardware.peak_flops_per_s < 1e15
    assert 1e6 < hardware.attention_flops_per_s <= hardware.peak_flops_per_s
    assert 1e7 < hardware.read_bytes_per_s < 1e13 and hardware.memory_bytes > 1e8
    assert 0 < hardware.layer_overhead_s < 1 and 0 < hardware.step_overhead_s < 1
    arrivals = [Arrival(time_s=0.0, prompt_len=301, output_len=3)]
    run = simulate(arrivals, System(name="x", sp=ranks), model_of("gqa"), hardware)
    [timing] = run.timings
    assert 0 < timing.ttft_s < 60
