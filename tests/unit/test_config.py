import dataclasses
import json

import pytest

from sps2_mega.config import (
    CacheConfig,
    CSAConfig,
    EngineConfig,
    ParallelConfig,
    SchedulerConfig,
)
from sps2_mega.config_mapping import engine_config_from_mapping, parts_of_engine_config


def test_parts_are_the_fields_that_are_configurations():
    assert parts_of_engine_config() == {
        "parallel": ParallelConfig,
        "cache": CacheConfig,
        "scheduler": SchedulerConfig,
        "csa": CSAConfig,
    }


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(
            model="m",
            parallel=ParallelConfig(tp=2, sp=6, sp_levels=(2, 3)),
            cache=CacheConfig(num_blocks=7),
            scheduler=SchedulerConfig(max_running=3),
            csa=CSAConfig(degrees=(1, 2, 4), spans=(64, 256), sample_queries=True),
            transport="ring",
        ),
    ],
)
def test_a_configuration_survives_json(config):
    assert engine_config_from_mapping(json.loads(json.dumps(dataclasses.asdict(config)))) == config
