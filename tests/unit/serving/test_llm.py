"""Decisions of LLM that need no model; tests/e2e tests generation itself."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sps2_mega.config import EngineConfig, ParallelConfig
from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.serving import LLM, SamplingParams
from sps2_mega.serving.llm import as_prompts, engine_config, params_for
from sps2_mega.serving.rank import config_from_json


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", [1]], ["a", [1]]),
        ([[1, 2]], [[1, 2]]),
        ([], []),
    ],
)
def test_prompt_spellings(given, expected) -> None:
    assert as_prompts(given) == expected


def test_wrong_prompt_is_named() -> None:
    with pytest.raises(RequestError, match="prompt 1 must be"):
        as_prompts(["a", None])


def test_one_params_for_all_or_one_each() -> None:
    greedy = SamplingParams(temperature=0)
    assert params_for(2, None) == [SamplingParams()] * 2
    assert params_for(2, greedy) == [greedy, greedy]
    assert params_for(1, [greedy]) == [greedy]
    with pytest.raises(RequestError, match="2 prompts need 2"):
        params_for(2, [greedy])


def test_options_go_to_the_part_that_knows_them() -> None:
    config = engine_config(
        "m", tp=2, sp=4, options={"num_blocks": 5, "dtype": "float32", "sp_levels": (2, 2)}
    )
    assert (config.parallel.tp, config.parallel.sp, config.parallel.sp_levels) == (2, 4, (2, 2))
    assert (config.cache.num_blocks, config.dtype) == (5, "float32")


def test_options_may_bear_the_names_of_their_flags() -> None:
    given = {"gpu_memory_utilization": 0.5, "csa_degrees": (1, 4), "num_gpu_blocks_override": 7}
    config = engine_config("m", tp=1, sp=1, options=given)
    assert (config.cache.memory_fraction, config.cache.num_blocks) == (0.5, 7)
    assert config.csa.degrees == (1, 4)
    twice = {"num_blocks": 7, "num_gpu_blocks_override": 7}
    with pytest.raises(ConfigError, match="num_gpu_blocks_override and num_blocks are the same"):
        engine_config("m", tp=1, sp=1, options=twice)


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown option max_len; known are .*max_model_len"):
        LLM("m", max_len=5)


def test_config_survives_the_way_to_a_child() -> None:
    config = EngineConfig(parallel=ParallelConfig(tp=2, sp_levels=(2, 3)), seed=9, max_model_len=7)
    for one in (config, EngineConfig()):
        assert config_from_json(json.dumps(dataclasses.asdict(one)).encode()) == one
