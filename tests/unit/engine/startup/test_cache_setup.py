import pytest

from sps2_mega.config import CacheConfig, ModelConfig
from sps2_mega.engine.startup.cache_setup import activation_bytes, decode_rank_bytes, num_kv_blocks
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
        (CacheConfig(num_blocks=0), 0, ["num_gpu_blocks_override", "0"]),
        (CacheConfig(memory_fraction=1.5), 10**9, ["gpu_memory_utilization", "1.5"]),
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


def test_gathered_keys_are_counted_for_all_tokens_and_only_where_they_are_gathered():
    model = ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=100,
        max_position_embeddings=64,
    )
    options = dict(num_tokens=1001, itemsize=2)
    ulysses = activation_bytes(model, tp=1, sp=4, gathers_keys=False, **options)
    gather = activation_bytes(model, tp=1, sp=4, gathers_keys=True, **options)
    assert gather - ulysses == 1001 * 4 * 2 * 8 * 2
    alone = activation_bytes(model, tp=1, sp=1, gathers_keys=True, **options)
    assert alone == activation_bytes(model, tp=1, sp=1, gathers_keys=False, **options)
    assert ulysses * 1001 == alone * 251  # a rank's share is rounded up


def test_ranks_that_only_decode_need_room_for_a_step_and_for_keys_that_come_in():
    model = ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=100,
        max_position_embeddings=64,
    )
    shape = dict(itemsize=2, num_decodes=3)
    step = activation_bytes(model, tp=2, sp=1, num_tokens=3, itemsize=2, gathers_keys=False)
    alone = decode_rank_bytes(model, tp=2, sp=1, num_received=1001, **shape)
    assert alone == step + 2 * 1001 * 8 * 2
    shared = decode_rank_bytes(model, tp=2, sp=4, num_received=1001, **shape)
    assert shared == step + 2 * 251 * 8 * 2
    # With more ranks than KV heads each rank still has one.
    assert decode_rank_bytes(model, tp=8, sp=1, num_received=10, **shape) > 2 * 10 * 8 * 2
