"""All ranks get the same numbers, measured once and then read from a file that one rank keeps."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from harness import free_port, run_ranks


def facts_on_rank(rank, port, folder, levels, networks, num_heads=4):
    from sps2_mega.config import ParallelConfig
    from sps2_mega.engine.startup.machine_probe import machine_facts
    from sps2_mega.engine.startup.transport_probe import LayerHeads
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    sp = info.world_size
    topology = agree_topology(store, info, ParallelConfig(sp=sp, sp_levels=levels))
    groups = initialize(store, info, topology, device=cpu, timeout_s=60)
    # Each rank has its own folder: what the others know must have come from rank 0.
    own = Path(folder) / str(rank)
    heads = LayerHeads(
        num_heads=num_heads, num_kv_heads=num_heads // 2, head_dim=32, dtype=torch.float32
    )
    found = []
    for network in networks:
        began = time.monotonic()
        machine = machine_facts(groups, heads, device=cpu, network=network, folder=own)
        found.append((machine, time.monotonic() - began))
    finalize()
    return found


@pytest.mark.parametrize(("sp", "levels"), [(2, None), (4, (2, 2)), (1, None)])
def test_ranks_agree_and_the_second_job_reads_the_file(tmp_path, sp, levels):
    args = (str(tmp_path), levels, ["a", "a", "b"])
    results = run_ranks(facts_on_rank, sp, free_port(), *args)
    for (machine, took), (again, _), (_, _) in results:
        assert machine == again == results[0][0][0]
        assert machine.sp_levels == (levels or (sp,))
        assert took < 30  # seconds, also where ranks share cores with other tests
        assert 1e6 < machine.flops_per_s < 1e15
        assert 0 < machine.call_s < 0.1 and 0 < machine.copy_s < 1e-5 and 0 < machine.merge_s < 1e-5
        cores = len(os.sched_getaffinity(0))  # one thread per rank here
        assert machine.ranks_per_core == pytest.approx(max(1.0, sp / cores))
        names = {"ulysses", "gather", "ring", "pass_q"} if sp > 1 else set()
        assert set(machine.layer_s) == names and set(machine.work_s) == names - {"ring"}
        for few, many in machine.layer_s.values():
            assert 0 < few <= many < 1
        assert all(0 < s < 1 for s in machine.work_s.values())
        for size, link in zip(machine.sp_levels, machine.links, strict=True):
            assert link.bytes_per_s > 1e5
            assert (0 < link.latency_s < 1) == (size > 1)
            assert (0 < link.core_s_per_byte < 1e-6) == (size > 1)
    assert len(list((tmp_path / "0").iterdir())) == 2  # one file per network
    assert not [p for rank in range(1, sp) for p in (tmp_path / str(rank)).glob("*")]
    ((later, _), *_) = run_ranks(facts_on_rank, sp, free_port(), *args)[-1]
    assert later == results[0][0][0]


def test_layers_are_measured_where_some_ranks_have_no_head(tmp_path):
    results = run_ranks(facts_on_rank, 4, free_port(), str(tmp_path), None, ["a"], 2)
    ((machine, _),) = results[0]
    assert set(machine.layer_s) == {"ulysses", "gather", "ring", "pass_q"}


def test_a_folder_that_cannot_be_used_and_a_damaged_file_only_cost_time(tmp_path):
    (tmp_path / "0").write_text("not a folder")
    ((machine, _),) = run_ranks(facts_on_rank, 2, free_port(), str(tmp_path), None, ["a"])[0]
    (tmp_path / "0").unlink()
    run_ranks(facts_on_rank, 2, free_port(), str(tmp_path), None, ["a"])
    (file,) = (tmp_path / "0").iterdir()
    file.write_text('{"links": 3}')
    ((again, _),) = run_ranks(facts_on_rank, 2, free_port(), str(tmp_path), None, ["a"])[1]
    assert machine.sp_levels == again.sp_levels == (2,)
    assert "flops_per_s" in file.read_text()  # written anew
