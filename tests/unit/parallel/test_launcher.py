"""Launch environments as torchrun and deepspeed really set them, and every way to break them."""

from __future__ import annotations

import pytest

from sps2_mega.errors import ConfigError
from sps2_mega.parallel.launcher import LaunchInfo, from_environment

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = MASTER | {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "5",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = MASTER | {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
EXPECTED = {
    "rank": 5,
    "world_size": 8,
    "local_rank": 1,
    "local_world_size": 4,
    "node_rank": 1,
    "master_addr": "10.0.0.1",
    "master_port": 29500,
}


@pytest.mark.parametrize(
    ("environ", "launcher"), [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed")]
)
def test_both_launchers_give_the_same_place(environ, launcher):
    assert from_environment(environ) == LaunchInfo(**EXPECTED, launcher=launcher)


def test_nothing_set_is_one_rank():
    info = from_environment({"PATH": "/bin", "MASTER_PORT": "29500"})
    assert (info.rank, info.world_size, info.local_world_size, info.launcher) == (0, 1, 1, "none")


def test_plain_environment_defaults_to_one_node():
    info = from_environment(MASTER | {"RANK": "2", "WORLD_SIZE": "3"})
    assert (info.local_rank, info.local_world_size, info.node_rank, info.launcher) == (
        2,
        3,
        0,
        "env",
    )


def test_plain_environment_of_several_nodes_derives_the_node_rank():
    environ = MASTER | {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert from_environment(environ).node_rank == 2
    assert from_environment(environ | {"NODE_RANK": "1"}).node_rank == 1


def test_uneven_nodes_are_accepted_from_torchrun():
    environ = TORCHRUN | {
        "RANK": "2",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "3",
    }
    assert from_environment(environ).node_rank == 1


def test_missing_variables_are_all_named():
    environ = {k: v for k, v in TORCHRUN.items() if k not in ("WORLD_SIZE", "MASTER_ADDR")}
    with pytest.raises(ConfigError, match=r"torchrun.*WORLD_SIZE, MASTER_ADDR not set.*RANK=5"):
        from_environment(environ)


def test_rank_alone_is_not_taken_for_a_single_process():
    with pytest.raises(ConfigError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"):
        from_environment({"RANK": "0"})


def test_local_rank_without_node_size_is_refused():
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE not set"):
        from_environment(MASTER | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize("value", ["one", "1.5", "0x1"])
def test_not_a_number_is_named(value):
    with pytest.raises(ConfigError, match="LOCAL_RANK must be an integer"):
        from_environment(TORCHRUN | {"LOCAL_RANK": value})


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "8"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_WORLD_SIZE": "9"},
        {"LOCAL_WORLD_SIZE": "8"},
        {"GROUP_RANK": "6"},
        {"RANK": "0"},
    ],
)
def test_contradictions_are_refused_with_the_numbers(changes):
    with pytest.raises(ConfigError, match=r"contradictory.*rank=.*world_size="):
        from_environment(TORCHRUN | changes)
