"""Files of model_configs/ describe published models: exact parameter counts, working degrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from sps2_mega.checkpoint.model_file import read_model_file
from sps2_mega.checkpoint.sharding import check_tp, num_parameters

FOLDER = Path(__file__).resolve().parents[2] / "model_configs"
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "sps2-tiny": 2_428_160,
    "yi-34b": 34_388_917_248,
}


def test_the_folder_has_exactly_the_published_models() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architecture_has_the_published_number_of_parameters(name: str) -> None:
    assert num_parameters(read_model_file(FOLDER / f"{name}.yaml").config) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_suggested_degrees_divide_the_heads(name: str) -> None:
    file = read_model_file(FOLDER / f"{name}.yaml")
    check_tp(file.config, file.tp)
    assert (file.config.num_heads // file.tp) % file.sp == 0


def test_only_the_bundled_model_has_weights() -> None:
    bundled = {name for name in PUBLISHED if read_model_file(FOLDER / f"{name}.yaml").weights}
    assert bundled == {"sps2-tiny"}
