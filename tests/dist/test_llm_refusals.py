"""`LLM` on every rank of a launcher: what cannot work is the same error on all, and all go on."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from harness import free_port, run_ranks
from safetensors.torch import load_file, save_file

from sps2_mega.checkpoint.resolve import resolve_model


def damaged(folder: Path, *, shape: bool = False, tokenizer: bool = False) -> str:
    """A copy of the bundled model with one tensor cut, or with a tokenizer that is none."""
    shutil.copytree(resolve_model("sps2-tiny").path, folder)
    if shape:
        (path,) = folder.glob("*.safetensors")
        tensors = load_file(path)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    if tokenizer:
        (folder / "tokenizer.json").write_text("[]")
    return str(folder)


def attempts_on_rank(rank, ports, attempts, world_size):
    """Error of each attempt as (type, text); then the greedy tokens of an LLM that works."""
    from sps2_mega.serving import LLM, SamplingParams

    errors = []
    for port, (model, options) in zip(ports, attempts, strict=False):
        os.environ["MASTER_PORT"] = str(port)  # a new one: the last store may still be closing
        try:
            LLM(model, sp=world_size, dtype="float32", **options)
        except ValueError as error:
            errors.append((type(error).__name__, str(error)))
    for thread in threading.enumerate():
        if thread.name.startswith("sps2-"):
            thread.join(10.0)  # one that has been told to end may need a moment on a busy machine
            assert not thread.is_alive(), thread.name
    assert not torch.distributed.is_initialized()
    os.environ["MASTER_PORT"] = str(ports[-1])
    try:
        with LLM("sps2-tiny", sp=world_size, dtype="float32", num_blocks=300) as llm:
            params = SamplingParams(max_tokens=4, temperature=0)
            with pytest.raises(ValueError, match="process group already"):
                LLM("sps2-tiny", sp=world_size)
            tokens = llm.generate("import ", params)[0].completions[0].token_ids
    except SystemExit as error:
        assert (rank > 0, error.code) == (True, 0)
        tokens = None
    return errors, tokens


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_raises_the_same_error_and_goes_on(tmp_path: Path, world_size: int) -> None:
    attempts = [
        (damaged(tmp_path / "shape", shape=True), {}),
        ("sps2-tiny", {"num_blocks": 10**9}),
        ("sps2-tiny", {"block_size": 0}),
        (damaged(tmp_path / "tokenizer", tokenizer=True), {}),
        ("sps2-tiny", {"max_model_len": 0}),
        (str(tmp_path / "nowhere"), {}),
    ]
    ports = [free_port() for _ in range(len(attempts) + 1)]
    results = run_ranks(attempts_on_rank, world_size, ports, attempts, world_size)
    errors, tokens = results[0]
    assert [kind for kind, _ in errors] == ["CheckpointError"] + ["ConfigError"] * 4 + [
        errors[-1][0]
    ]
    for (_, text), words in zip(
        errors,
        [
            "final_layernorm",
            "not enough memory while allocating the KV cache",
            "block_size must be at least 1",
            "tokenizer.json",
            "max_model_len must be at least 1",
            "nowhere",
        ],
        strict=True,
    ):
        assert words in text
    assert len(tokens) == 4
    for others, nothing in results[1:]:
        assert others == errors
        assert nothing is None
