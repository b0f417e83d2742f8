"""TP slices against a model written out by heads: each row of each weight is Megatron's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sps2_mega.checkpoint.canonical import canonical_shapes, num_parameters, split_layer
from sps2_mega.checkpoint.sharding import (
    check_tp,
    local_shapes,
    num_query_groups,
    padded_vocab_size,
    shard,
)
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

CONFIG = ModelConfig(
    family="qwen2",
    num_layers=3,
    hidden_size=20,
    ffn_hidden_size=24,
    num_heads=12,
    num_kv_heads=2,
    head_dim=5,
    vocab_size=131,
    max_position_embeddings=9,
    qkv_bias=True,
)
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


def labelled_qkv(config: ModelConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A canonical QKV weight, and each of its heads by name."""
    heads, blocks = {}, []
    per_group = config.num_heads // config.num_kv_heads
    for kv in range(config.num_kv_heads):
        names = [f"q{kv * per_group + i}" for i in range(per_group)] + [f"k{kv}", f"v{kv}"]
        for name in names:
            heads[name] = torch.randn(config.head_dim, config.hidden_size)
            blocks.append(heads[name])
    return torch.cat(blocks), heads


@pytest.mark.parametrize(
    ("tp", "rank", "expected"),
    [
        (
            1,
            0,
            [f"q{i}" for i in range(6)]
            + ["k0", "v0", *(f"q{i}" for i in range(6, 12)), "k1", "v1"],
        ),
        (2, 1, [*(f"q{i}" for i in range(6, 12)), "k1", "v1"]),
        (4, 0, ["q0", "q1", "q2", "k0", "v0"]),
        (4, 1, ["q3", "q4", "q5", "k0", "v0"]),
        (4, 2, ["q6", "q7", "q8", "k1", "v1"]),
        (12, 5, ["q5", "k0", "v0"]),
        (12, 6, ["q6", "k1", "v1"]),
    ],
)
def test_query_heads_stay_with_their_kv_head(tp: int, rank: int, expected: list[str]) -> None:
    whole, heads = labelled_qkv(CONFIG)
    mine = shard(QKV, whole, CONFIG, tp_rank=rank, tp=tp)
    assert torch.equal(mine, torch.cat([heads[name] for name in expected]))


def test_a_bias_is_cut_like_its_weight() -> None:
    whole = torch.arange(16 * 5.0)
    column = whole[:, None].expand(-1, CONFIG.hidden_size)
    for rank in range(4):
        bias = shard(QKV.replace("weight", "bias"), whole, CONFIG, tp_rank=rank, tp=4)
        assert torch.equal(bias, shard(QKV, column, CONFIG, tp_rank=rank, tp=4)[:, 0])


def test_gate_and_up_are_each_cut() -> None:
    gate, up = torch.randn(24, 20), torch.randn(24, 20)
    mine = shard(FC1, torch.cat((gate, up)), CONFIG, tp_rank=2, tp=4)
    assert torch.equal(mine, torch.cat((gate[12:18], up[12:18])))


def test_an_ungated_mlp_is_cut_as_one() -> None:
    config = replace(CONFIG, activation="gelu")
    whole = torch.randn(24, 20)
    assert torch.equal(shard(FC1, whole, config, tp_rank=1, tp=4), whole[6:12])


def test_output_projections_are_cut_by_columns_and_their_biases_kept() -> None:
    weight, bias = torch.randn(20, 60), torch.randn(20)
    name = "decoder.layers.0.self_attention.linear_proj."
    assert torch.equal(shard(f"{name}weight", weight, CONFIG, tp_rank=2, tp=4), weight[:, 30:45])
    assert shard(f"{name}bias", bias, CONFIG, tp_rank=2, tp=4) is bias


def test_vocabulary_rows_are_padded_with_zeros() -> None:
    whole = torch.randn(131, 20)
    parts = [shard("output_layer.weight", whole, CONFIG, tp_rank=rank, tp=4) for rank in range(4)]
    assert [len(part) for part in parts] == [128] * 4
    joined = torch.cat(parts)
    assert torch.equal(joined[:131], whole)
    assert not joined[131:].any()


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"),
    [(1, 1, 128), (128, 1, 128), (129, 1, 256), (50257, 2, 50432), (32000, 8, 32768)],
)
def test_padding_follows_megatrons_rule(vocab: int, tp: int, rows: int) -> None:
    assert padded_vocab_size(vocab, tp) == rows


@pytest.mark.parametrize("tp", [1, 2, 4, 12])
@pytest.mark.parametrize(
    "changes", [{}, {"activation": "gelu", "linear_bias": True, "norm": "layernorm", "rope": None}]
)
def test_local_shapes_are_those_of_the_slices(tp: int, changes: dict) -> None:
    config = replace(CONFIG, **changes)
    slices = {
        name: tuple(shard(name, torch.zeros(shape), config, tp_rank=tp - 1, tp=tp).shape)
        for name, shape in canonical_shapes(config).items()
    }
    assert slices == local_shapes(config, tp)


@pytest.mark.parametrize(
    ("changes", "tp", "numbers"),
    [
        ({}, 5, ("12", "5")),
        ({"ffn_hidden_size": 25}, 2, ("25", "2")),
        ({"num_kv_heads": 4}, 6, ("4", "6")),
        ({}, 0, ("0",)),
    ],
)
def test_an_impossible_tp_names_both_numbers(
    changes: dict, tp: int, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_tp(replace(CONFIG, **changes), tp)
    assert all(number in str(caught.value) for number in numbers)


@pytest.mark.parametrize(("tp", "groups"), [(1, 2), (2, 2), (4, 4), (12, 12)])
def test_every_rank_has_a_query_group(tp: int, groups: int) -> None:
    assert num_query_groups(CONFIG, tp) == groups


def test_tied_embeddings_count_once() -> None:
    tied = replace(CONFIG, tie_embeddings=True)
    assert num_parameters(CONFIG) - num_parameters(tied) == 131 * 20


def test_layer_names_split() -> None:
    assert split_layer(FC1) == (1, "mlp.linear_fc1.weight")
    assert split_layer("decoder.final_layernorm.weight") == (None, "decoder.final_layernorm.weight")
    assert split_layer("decoder.layers.mlp.linear_fc1.weight")[0] is None
