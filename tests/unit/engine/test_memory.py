import pytest

from sps2_mega.config import CacheConfig
from sps2_mega.engine.memory import num_kv_blocks
from sps2_mega.errors import ConfigError

MIB = 2**20


def blocks(cache=None, **changes):
    options = dict(
        bytes_per_block=MIB, free_bytes=1000 * MIB, activation_bytes=100 * MIB, useful_blocks=10**6
    )
    return num_kv_blocks(cache or CacheConfig(memory_fraction=0.5), **(options | changes))


def test_blocks_fill_the_share_of_free_memory():
    assert blocks() == 400


def test_no_more_than_useful():
    assert blocks(useful_blocks=33) == 33


def test_configured_number_wins():
    assert blocks(CacheConfig(num_blocks=7), free_bytes=0) == 7


@pytest.mark.parametrize(
    ("cache", "free", "words"),
    [
        (CacheConfig(num_blocks=0), 0, ["num_kv_blocks", "0"]),
        (CacheConfig(memory_fraction=1.5), 10**9, ["kv_memory_fraction", "1.5"]),
        (
            CacheConfig(memory_fraction=0.5),
            200 * MIB,
            ["200 MiB free", "100 MiB", "50%", "1.00 MiB"],
        ),
    ],
)
def test_what_cannot_work_is_said_with_numbers(cache, free, words):
    with pytest.raises(ConfigError) as error:
        blocks(cache, free_bytes=free)
    for word in words:
        assert word in str(error.value)
