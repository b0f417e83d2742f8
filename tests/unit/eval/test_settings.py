"""Names of settings, their configurations and their exact costs."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sps2_mega.attention.pattern import CSAPattern
from sps2_mega.config import CSAConfig, ModelConfig
from sps2_mega.errors import ConfigError
from tools.eval.settings import DEFAULT_SETTINGS, Extents, cost, csa_config, parse_span

EXTENTS = Extents(spans=(Fraction(1, 8), 96), sinks=4, halo=10, tail=7)
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
    ],
)
def test_a_name_is_a_configuration(name, expected):
    assert csa_config(name, 203, EXTENTS) == expected


def test_every_default_setting_is_understood():
    for name in DEFAULT_SETTINGS:
        assert csa_config(name, 203, EXTENTS).exact == (name == "dense")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keys", ["'keys'", "keys-dN"]),
        ("keys-d2-nohalos", ["'keys-d2-nohalos'"]),
        ("local-d4", ["'local-d4'"]),
        ("dense-notail", ["'dense-notail'", "tail"]),
        ("keys-d2.4.8", ["4 levels", "3 spans", "got 2"]),
    ],
)
def test_a_wrong_name_is_refused(name, words):
    with pytest.raises(ConfigError) as error:
        csa_config(name, 203, EXTENTS)
    for word in words:
        assert word in str(error.value)


def test_spans_are_tokens_or_shares():
    assert parse_span("256") == 256
    assert parse_span("1/8") == Fraction(1, 8)
    for text in ("0", "-3", "9/8", "1/0", "eighth", "0.0"):
        with pytest.raises(ConfigError, match="span"):
            parse_span(text)


@pytest.mark.parametrize("name", ["keys-d2", "keys-d3-notail", "keys-d2.4", "paper-d3", "local"])
def test_costs_are_counts_of_pairs(name):
    length = 203
    csa = csa_config(name, length, EXTENTS)
    assert csa.spans is not None
    pattern = CSAPattern(
        degrees=csa.degrees,
        spans=csa.spans,
        sinks=csa.sinks,
        halo=csa.halo,
        tail=csa.tail,
        sample_queries=csa.sample_queries,
    )
    pairs, moved, all_moved = 0, set(), set()
    for layer in range(MODEL.num_layers):
        for head in range(MODEL.num_kv_heads):
            for i in range(length):
                cell = i // csa.spans[0]
                for j in range(i + 1):
                    seen = pattern.sees(i, j, kv_head=head, layer=layer, prompt_len=length)
                    pairs += seen
                    if j < cell * csa.spans[0] and i < length - csa.tail:
                        all_moved.add((layer, head, cell, j))
                        if seen:
                            moved.add((layer, head, cell, j))
    measured = cost(csa, length, MODEL)
    all_pairs = MODEL.num_layers * MODEL.num_kv_heads * length * (length + 1) // 2
    assert measured.flops == pytest.approx(pairs / all_pairs)
    assert measured.keys_moved == pytest.approx(len(moved) / len(all_moved))


def test_local_moves_only_sinks_and_halo():
    local = csa_config("local", 203, EXTENTS)
    least = (4 + 10) / 203
    assert least < cost(local, 203, MODEL).keys_moved < 4 * least
