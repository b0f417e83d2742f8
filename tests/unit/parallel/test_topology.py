import pytest

from sps2_mega.errors import ConfigError
from sps2_mega.parallel.topology import build_topology, check_degrees


def nodes(count: int, ranks_each: int) -> list[str]:
    return [f"host{node}" for node in range(count) for _ in range(ranks_each)]


@pytest.mark.parametrize(
    ("tp", "sp", "num_nodes", "ranks_each", "levels"),
    [
        (1, 1, 1, 1, (1,)),
        (2, 1, 1, 2, (1,)),
        (1, 4, 1, 4, (4,)),
        (2, 4, 2, 4, (2, 2)),
        (1, 6, 3, 2, (2, 3)),
        (4, 2, 2, 4, (2,)),  # TP fills a node: SP is between nodes only
        (2, 1, 2, 1, (1,)),  # TP across nodes
        (4, 2, 4, 2, (2,)),
    ],
)
def test_levels_follow_the_nodes(tp, sp, num_nodes, ranks_each, levels):
    topology = build_topology(tp=tp, sp=sp, sp_levels=None, nodes=nodes(num_nodes, ranks_each))
    assert topology.sp_levels == levels


def test_groups_of_two_levels():
    topology = build_topology(tp=2, sp=4, sp_levels=None, nodes=nodes(2, 4))
    assert topology.sp_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [topology.coordinates(rank) for rank in (0, 3, 6)] == [(0, 0), (1, 1), (0, 3)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(tp=2, sp=3, sp_levels=None, nodes=nodes(1, 4)), ["tp=2", "sp=3", "= 6", "4 ranks"]),
        (dict(tp=0, sp=1, sp_levels=None, nodes=["a"]), ["tp=0"]),
        (dict(tp=1, sp=4, sp_levels=(2, 3), nodes=nodes(1, 4)), ["2 * 3 = 6", "sp=4"]),
        (dict(tp=1, sp=4, sp_levels=(4, 1), nodes=nodes(2, 2)), ["sp_levels[0]=4", "2 ranks"]),
        (dict(tp=3, sp=2, sp_levels=None, nodes=nodes(3, 2)), ["tp=3", "2 ranks per node"]),
        (dict(tp=1, sp=3, sp_levels=None, nodes=["a", "a", "b"]), ["a: 2", "b: 1"]),
        (dict(tp=1, sp=4, sp_levels=None, nodes=["a", "b", "a", "b"]), ["node by node"]),
    ],
)
def test_impossible_layouts_are_refused_with_their_factors(options, words):
    with pytest.raises(ConfigError) as error:
        build_topology(**options)
    for word in words:
        assert word in str(error.value)


def test_degrees_alone():
    check_degrees(tp=2, sp=2, world_size=4)
    with pytest.raises(ConfigError, match="1 rank was started"):
        check_degrees(tp=2, sp=2, world_size=1)
