"""Random settings of training runs: equal to megatron-core's own model, or refused by name."""

from __future__ import annotations

import collections
import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from model_run import assert_logits, logits_on_rank
from unit.checkpoint.checkpoints import MemorySource

from sps2_mega.checkpoint.export import export_megatron
from sps2_mega.config import ModelConfig, RopeConfig
from sps2_mega.errors import ConfigError

TOLERANCE = 1e-4
TOKENS = 40
_MEGATRONS_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def outcomes_on_rank(rank: int, port: int, seeds: list[int]) -> list[tuple[int, str, Any]]:
    """(seed, outcome, details) of each configuration, see `outcome`."""
    from dist.checkpoint import random_settings

    with one_rank(port) as (groups, defaults):
        drawn = [random_settings.draw(seed, defaults=defaults) for seed in seeds]
        return [
            (seed, *outcome(one, groups, nested=defaults))
            for seed, one in zip(seeds, drawn, strict=True)
        ]


def sweep_on_rank(rank: int, port: int) -> list[tuple[Any, str, Any, float]]:
    """(configuration, outcome, details, effect) of every change that can be drawn, alone.

    The effect is how far the oracle's logits are from those of the base.
    """
    from dist.checkpoint import random_settings, stock_megatron

    results = []
    with one_rank(port) as (groups, defaults):
        for base, settings in random_settings.BASES.items():
            bridge = base.startswith("bridge")
            tokens = [(7 * i * i + 3 * i) % 100 for i in range(TOKENS)]
            usual, _ = stock_megatron.stock_logits(settings, bridge=bridge, tokens=tokens)
            for drawn in random_settings.every_change(base):
                kind, details = outcome(drawn, groups, nested=defaults)
                effect = 0.0
                if kind == "equal":
                    logits, _ = stock_megatron.stock_logits(
                        drawn.settings, bridge=bridge, tokens=tokens
                    )
                    effect = (logits[:, :100] - usual[:, :100]).abs().max().item()
                results.append((drawn, kind, details, effect))
    return results


@contextlib.contextmanager
def one_rank(port: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Groups of a job of one rank, and the defaults of the installed TransformerConfig."""
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore._compat import eager_import
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    with eager_import("cpu"):
        from megatron.core.transformer import TransformerConfig

    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig())
    groups = initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
    yield groups, {f.name: f.default for f in fields(TransformerConfig) if f.default is not MISSING}
    finalize()


def outcome(drawn: Any, groups: Any, nested: Any) -> tuple[str, Any]:
    """What becomes of a configuration.

    equal: our logits are the oracle's. different: they are not. refused: by the name of a setting
    that was changed. misnamed: by another one. no oracle: Megatron does not run it.
    """
    from dist.checkpoint import stock_megatron

    from sps2_mega.checkpoint.megatron.settings.arguments import model_config_from_args
    from sps2_mega.checkpoint.megatron.settings.bridge import bridge_args

    try:
        args = drawn.settings
        if drawn.bridge:
            args = bridge_args(drawn.run_config(nested), "run_config.yaml")
        config = model_config_from_args(args, "arguments")
    except ConfigError as error:
        named = any(re.search(rf"\b{name}\b", str(error)) for name in drawn.changes)
        return ("refused" if named else "misnamed"), str(error)
    tokens = [(7 * i * i + 3 * i) % config.vocab_size for i in range(TOKENS)]
    try:
        expected, weights = stock_megatron.stock_logits(
            drawn.settings, bridge=drawn.bridge, tokens=tokens
        )
    except _MEGATRONS_REFUSALS as error:
        return "no oracle", f"{type(error).__name__}: {error}"
    logits = our_logits(config, weights, tokens, groups)
    difference = (logits - expected[:, : config.vocab_size]).abs().max().item()
    return ("equal" if difference < TOLERANCE else "different"), difference


def our_logits(config: Any, weights: dict[str, Any], tokens: list[int], groups: Any) -> Any:
    """Logits of one rank, by the layers, the attention and the cache of the engine."""
    from model_run import prefill_items

    from sps2_mega.attention.build import PrefillSetup
    from sps2_mega.checkpoint.sharding import local_shapes
    from sps2_mega.kv_cache.pool import KVPool
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.worker.batching import prefill_input
    from sps2_mega.worker.local_tables import LocalTables

    cpu = torch.device("cpu")
    model = GPT(config, groups, dtype=torch.float32, device=cpu)
    ours = model.weights()
    assert set(ours) == set(weights) == set(local_shapes(config, 1))
    for name, weight in weights.items():
        rows = ours[name][: len(weight)]
        rows.copy_(weight[: len(ours[name])])
    pool = KVPool(
        num_layers=config.num_layers,
        num_blocks=8,
        block_size=16,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=cpu,
    )
    items = prefill_items([tokens], [8], 16, "contiguous")
    tables = LocalTables(rank=0, block_size=16)
    setup = PrefillSetup(transport="gather")
    step = prefill_input(items, tables, pool, groups.sp, setup, device=cpu)
    return model(step.tokens_T, step.positions_T, torch.arange(len(tokens)), step.attention)


def run_seeds(seeds: list[int], timeout: float) -> list[tuple[int, str, Any]]:
    return run_alone(outcomes_on_rank, seeds, timeout=timeout)


def run_alone(fn: Any, *args: Any, timeout: float) -> Any:
    """The result of one rank, in a process of its own: the oracle changes Megatron's globals."""
    pool = harness.RankPool(1)
    try:
        (result,) = pool.run(fn, harness.free_port(), *args, timeout=timeout)
    finally:
        pool.close()
    return result


def check(results: list[tuple[int, str, Any]]) -> collections.Counter[str]:
    wrong = [result for result in results if result[1] in ("different", "misnamed")]
    assert not wrong, wrong
    return collections.Counter(kind for _, kind, _ in results)


def test_some_random_settings_are_equal_or_refused():
    counts = check(run_seeds(list(range(60)), timeout=120))
    assert counts["equal"] >= 12
    assert counts["refused"] >= 12


EVERYTHING = ModelConfig(
    family="llama",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=130,
    max_position_embeddings=64,
    activation="quick_gelu_gated",
    activation_clamp=0.7,
    glu_linear_offset=1.0,
    qk_l2_norm=True,
    softmax_scale=0.4,
    rope=RopeConfig(rotary_dim=8, interleaved=True),
    no_rope_layers=(0,),
    dtype="float32",
)


@pytest.mark.parametrize("rope", [EVERYTHING.rope, RopeConfig(scaling="linear", factor=2.0)])
def test_settings_are_the_same_on_four_ranks(tmp_path: Path, rope: RopeConfig):
    config = replace(EVERYTHING, rope=rope)
    export_megatron(MemorySource(config), tmp_path / "model")
    folders = {"model": tmp_path / "model"}
    tokens = [[(7 * i * i + 3 * i) % config.vocab_size for i in range(45)]]
    one_rank = {"model": str(tmp_path / "model")}
    (alone,) = harness.run_ranks(logits_on_rank, 1, one_rank, tokens, 1, 1, harness.free_port())
    parts = sorted(alone["model", "gather"], key=lambda part: part[1])
    expected = {"model": [torch.cat([logits for _, _, logits in parts])]}
    assert_logits(expected, folders, tokens, tp=2, sp=2, tolerance=TOLERANCE)


@pytest.mark.exhaustive
def test_a_thousand_random_settings_are_equal_or_refused():
    """Settings that Megatron itself refuses, or cannot run on a CPU, are drawn again."""
    counts: collections.Counter[str] = collections.Counter()
    seed = 0
    while counts["equal"] + counts["refused"] < 1000:
        counts += check(run_seeds(list(range(seed, seed + 250)), timeout=600))
        seed += 250
    print(f"\n{seed} drawn: {dict(counts)}")


@pytest.mark.exhaustive
def test_every_setting_that_is_run_has_its_effect():
    results = run_alone(sweep_on_rank, timeout=600)
    assert not [result for result in results if result[1] in ("different", "misnamed")]
    effects: dict[str, float] = {}
    for drawn, kind, _, effect in results:
        for name in drawn.changes if kind == "equal" else ():
            effects[name] = max(effects.get(name, 0.0), effect)
    print(f"\n{collections.Counter(kind for _, kind, _, _ in results)}")
    without = {name for name, effect in effects.items() if effect < 10 * TOLERANCE}
    assert without == {
        "bf16", "fp16", "tensor_model_parallel_size", "pipeline_model_parallel_size",
        "openai_gelu", "transformer_impl", "transformer_layer_spec",
        "rotary_seq_len_interpolation_factor",
    }  # fmt: skip
