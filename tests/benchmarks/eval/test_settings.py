"""Names of settings, their configurations and their exact costs."""

from __future__ import annotations

from fractions import Fraction

import pytest

from benchmarks.eval.costs import cost, second_turn_bytes
from benchmarks.eval.settings import DEFAULT_SETTINGS, Extents, named_setting, parse_span
from sps2_mega.attention.csa.pattern import CSAPattern
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError

EXTENTS = Extents(spans=(Fraction(1, 8), 60, 96), sinks=4, halo=10, tail=7)
MODEL = ModelConfig(
    family="llama",
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=9,
    max_position_embeddings=512,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", CSAConfig()),
        ("keys-d4", CSAConfig(degrees=(1, 4), spans=(25,), sinks=4, halo=10, tail=7)),
        ("keys-d2.4", CSAConfig(degrees=(1, 2, 4), spans=(25, 96), sinks=4, halo=10, tail=7)),
        (
            "keys-d3-nosinks-nohalo-notail",
            CSAConfig(degrees=(1, 3), spans=(25,), sinks=0, halo=0, tail=0),
        ),
        (
            "paper-d4",
            CSAConfig(degrees=(1, 4), spans=(25,), sinks=0, halo=0, tail=0, sample_queries=True),
        ),
        (
            "paper-d4-tail",
            CSAConfig(degrees=(1, 4), spans=(25,), sinks=0, halo=0, tail=7, sample_queries=True),
        ),
        (
            "keys-d2.4.8-b16",
            CSAConfig(degrees=(1, 2, 4, 8), spans=(25, 60, 96), sinks=4, halo=10, tail=7, block=16),
        ),
    ],
)
def test_a_name_is_a_configuration(name, expected):
    assert named_setting(name, 203, EXTENTS).csa == expected
    assert not named_setting(name, 203, EXTENTS).sparse_decode


def test_a_strided_decode_changes_nothing_in_prefill():
    for name in ("keys-d4-b16-notail", "local", "paper-d2"):
        setting = named_setting(f"{name}-stridedecode", 203, EXTENTS)
        assert setting.sparse_decode
        assert setting.csa == named_setting(name, 203, EXTENTS).csa


def test_every_default_setting_is_understood():
    for name in DEFAULT_SETTINGS:
        assert named_setting(name, 203, EXTENTS).csa.exact == (name == "dense")


def test_local_is_understood_at_any_length():
    for length in (1, 5, 70000, 1 << 20):
        assert named_setting("local", length, EXTENTS).csa.degrees[1] <= length


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keys", ["'keys'", "keys-dN"]),
        ("keys-d2-nohalos", ["'keys-d2-nohalos'"]),
        ("local-d4", ["'local-d4'"]),
        ("dense-notail", ["'dense-notail'", "tail"]),
        ("dense-b4", ["'dense-b4'", "block"]),
        ("keys-d4-notail-b16", ["'keys-d4-notail-b16'", "-bN"]),
        ("keys-d2.4.8.16", ["5 levels", "4 spans", "got 3"]),
    ],
)
def test_a_wrong_name_is_refused(name, words):
    with pytest.raises(ConfigError) as error:
        named_setting(name, 203, EXTENTS)
    for word in words:
        assert word in str(error.value)


def test_spans_are_tokens_or_shares():
    assert parse_span("256") == 256
    assert parse_span("1/8") == Fraction(1, 8)
    for text in ("0", "-3", "9/8", "1/0", "eighth", "0.0"):
        with pytest.raises(ConfigError, match="span"):
            parse_span(text)


@pytest.mark.parametrize(
    "name",
    [
        *("keys-d2", "keys-d3-notail", "keys-d2.4", "keys-d3-b8", "paper-d3"),
        *("local-stridedecode", "keys-d3-b8-stridedecode"),
    ],
)
def test_costs_are_counts_of_pairs(name):
    length = 203
    setting = named_setting(name, length, EXTENTS)
    csa = setting.csa
    assert csa.spans is not None
    pattern = CSAPattern(
        degrees=csa.degrees,
        spans=csa.spans,
        sinks=csa.sinks,
        halo=csa.halo,
        tail=csa.tail,
        sample_queries=csa.sample_queries,
        block=csa.block,
    )
    sees = pattern.sees
    pairs, moved, all_moved = 0, set(), set()
    for layer in range(MODEL.num_layers):
        for head in range(MODEL.num_kv_heads):
            for i in range(length):
                cell = i // csa.spans[0]
                for j in range(i + 1):
                    seen = sees(i, j, kv_head=head, layer=layer, prompt_len=length)
                    pairs += seen
                    if j < cell * csa.spans[0] and i < length - csa.tail:
                        all_moved.add((layer, head, cell, j))
                        if seen:
                            moved.add((layer, head, cell, j))
    measured = cost(setting, length, MODEL, cell=25)
    all_pairs = MODEL.num_layers * MODEL.num_kv_heads * length * (length + 1) // 2
    assert measured.flops == pytest.approx(pairs / all_pairs)
    assert measured.keys_moved == pytest.approx(len(moved) / len(all_moved))
    # 203 tokens in cells of 25: the last one has 3, and the tail of 7 lies in cells 7 and 8.
    row, query = 2 * 4 * 2, 4 * (2 * 4 * 2 + 4)
    sent = len(moved) / MODEL.num_layers * row + (4 * 7 + 3 * 8 if csa.tail else 0) * query
    assert measured.rank_bytes == pytest.approx(sent / 9)
    dense = cost(named_setting("dense", length, EXTENTS), length, MODEL, cell=25)
    assert dense.rank_bytes == pytest.approx(2 * sum(range(25, 203, 25)) * row / 9)
    assert measured.bytes_moved == pytest.approx(measured.rank_bytes / dense.rank_bytes)
    if not setting.sparse_decode:
        assert measured.decode_keys == 1.0
    elif csa.block > 1:  # keys visible to the next token, without a tail to make it exact
        seen = [
            sees(length, j, kv_head=head, layer=0, prompt_len=2 * length)
            for head in range(3)
            for j in range(length + 1)
        ]
        assert measured.decode_keys == pytest.approx(sum(seen) / len(seen))


def test_local_moves_only_sinks_and_halo():
    local = named_setting("local", 203, EXTENTS)
    least = (4 + 10) / 203
    assert least < cost(local, 203, MODEL, cell=25).keys_moved < 4 * least


def test_a_cost_at_a_long_context_does_not_depend_on_blocks():
    one, block = (
        cost(named_setting(name, 131072, EXTENTS), 131072, MODEL, cell=16384)
        for name in ("keys-d4", "keys-d4-b16")
    )
    assert one == block
    assert one.bytes_moved == pytest.approx(0.25, abs=0.01)


def test_a_second_turn_moves_its_queries_there_and_back():
    assert second_turn_bytes(10, 1, MODEL) == 0
    assert second_turn_bytes(10, 4, MODEL) == 10 * 4 * (2 * 4 * 2 + 4) * 3 / 4
