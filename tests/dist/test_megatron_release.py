"""What differs between releases of megatron-core, and one model on the release that runs here.

`make test-megatron VERSION=...` runs this with another release than that of constraints.txt; in CI
with `SHORT=1`, which runs this file only.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import families
import harness
import pytest
import torch
from dist.checkpoint import checkpoint_writer as writer
from harness import free_port, run_ranks
from model_run import assert_logits

from sps2_mega.checkpoint.export import export_huggingface, export_megatron
from sps2_mega.checkpoint.source import open_checkpoint, read_canonical

WANTED = os.environ.get("SPS2_TEST_MEGATRON")


def version_on_rank(rank):
    import megatron.core

    return megatron.core.__version__.split("+")[0]  # 0.19 adds the commit of the folder it runs in


def test_ranks_run_the_release_that_was_asked_for():
    (found,) = run_ranks(version_on_rank, 1)
    assert tuple(map(int, found.split(".")[:2])) in [(0, minor) for minor in range(16, 20)]
    assert WANTED is None or found == WANTED


def missing_on_rank(rank, name):
    from sps2_mega.mcore._compat import eager_import

    with eager_import("cpu"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_package_that_megatron_imports_undeclared_is_named():
    """0.18 and 0.19 import triton without declaring it, as a CPU build of torch shows."""
    with pytest.raises(harness.RankError, match=r"ConfigError: megatron-core .*pip install triton"):
        run_ranks(missing_on_rank, 1, "triton")
    with pytest.raises(harness.RankError, match="ModuleNotFoundError: No module named 'torchx'"):
        run_ranks(missing_on_rank, 1, "torchx")


def said_on_rank(rank, port):
    """Records and warnings of building a model, and whether Megatron may log again afterwards."""
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.build import build_gpt_model
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    os.environ["MASTER_PORT"] = str(port)
    info, listener, logger = from_environment(), Listener(), logging.getLogger("megatron")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig())
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
            build_gpt_model(writer.LLAMA, tp=1, sp=1, dtype=torch.float32)
        silent = [*said, *(str(one.message) for one in warned)]
        logging.getLogger("megatron.core.models.gpt.gpt_model").warning("heard")
    finally:
        logger.removeHandler(listener)
        finalize()
    return silent, said[-1:]


def test_building_a_model_says_nothing():
    """0.19 logs that GPTModel is deprecated, on which users cannot act."""
    ((silent, after),) = run_ranks(said_on_rank, 1, free_port())
    assert silent == []
    assert after == ["heard"]


def test_a_model_gives_transformers_logits_on_one_and_two_ranks(tmp_path: Path) -> None:
    model = families.save_family("llama3-rope", tmp_path)
    prompts = families.prompts((1, 17, 129))
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for tp, sp in ((1, 1), (1, 2), (2, 1)):
        assert_logits(
            {"llama": expected}, {"llama": tmp_path}, prompts, tp=tp, sp=sp, tolerance=1e-4
        )


def test_a_checkpoint_that_it_writes_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Through our reader, and through its own after conversion to Hugging Face and back."""
    weights = writer.canonical_weights(writer.LLAMA)
    theirs, converted = tmp_path / "theirs", tmp_path / "converted"
    pool = harness.RankPool(2)
    try:
        pool.run(writer.write_torch_dist, theirs, writer.LLAMA, 2, 1)
        source = open_checkpoint(theirs)
        export_huggingface(source, tmp_path / "hf")
        export_megatron(open_checkpoint(tmp_path / "hf"), converted)
        (loaded, _) = pool.run(writer.load_with_megatron, converted / "release", writer.LLAMA)
    finally:
        pool.close()
    assert source.config == open_checkpoint(converted).config == writer.LLAMA
    for name, expected in weights.items():
        assert torch.equal(read_canonical(source, name, writer.LLAMA), expected), name
        assert torch.equal(loaded[name][: len(expected)], expected), name
