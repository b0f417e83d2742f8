"""Sliced feed-forward and output layers give what each rank computes for its own rows."""

from __future__ import annotations

import os
from typing import Any

import families
import pytest
import torch
from engine_run import assert_same, run_engine
from harness import free_port, run_ranks

COUNTS = [[1, 0, 0], [0, 2, 1], [5, 4, 7], [0, 0, 33]]
OPTIONS = {"max_model_len": 512, "cache": {"num_blocks": 96}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name in ("llama3-rope", "gpt2"):
        found[name] = tmp_path_factory.mktemp(name)
        families.save_family(name, found[name])
    return found


def layers_on_rank(rank: int, folder: str, port: int) -> list[tuple[float, float]]:
    """Largest differences between sliced and whole: feed-forward layer, logits; per count, with
    plain and with packed weights."""
    from sps2_mega.checkpoint.load import load_weights
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(sp=info.world_size))
    groups = initialize(store, info, topology, device=cpu, timeout_s=60)
    source = open_checkpoint(folder)
    model = GPT(source.config, groups, dtype=torch.float32, device=cpu)
    load_weights(model.weights(), source, source.config, tp_rank=0, tp=1)
    mlp = model.gpt.decoder.layers[1].mlp
    apart = []
    for packed in (False, True):
        if packed:
            model.pack()
        for counts in COUNTS:
            counts = counts[: info.world_size]
            generator = torch.Generator().manual_seed(rank)
            hidden = torch.randn(max(1, counts[rank]), 1, model.hidden_size, generator=generator)
            outputs = []
            for rows in (None, counts):
                model.feed_forward(hidden[:0], range(0), rows)  # names the rows of the next call
                with torch.inference_mode():
                    outputs.append(mlp(hidden)[0][: counts[rank]])
            own = hidden[: counts[rank]]
            logits = [model.logits(own, rows) for rows in (None, counts)]
            assert logits[0].shape == logits[1].shape == (counts[rank], model.vocab_size)
            apart.append(tuple(difference(*pair) for pair in (outputs, logits)))
    finalize()
    return apart


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item() if one.numel() else 0.0


@pytest.mark.parametrize("family", ["llama3-rope", "gpt2"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_add_up(folders, family: str, ranks: int) -> None:
    """Odd shares of the inner dimension and of the vocabulary, and ranks without rows."""
    for found in run_ranks(layers_on_rank, ranks, str(folders[family]), free_port()):
        assert len(found) == 2 * len(COUNTS)
        assert max(max(pair) for pair in found) < 1e-5


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    texts = families.prompts((33, 1, 150, 16, 7), seed=6)
    greedy = dict(max_tokens=12, temperature=0.0, logprobs=2, ignore_eos=True)
    return [(text, greedy) for text in texts]


@pytest.mark.parametrize(
    ("family", "tp", "sp", "weights"),
    [
        ("llama3-rope", 1, 2, "auto"),
        ("llama3-rope", 1, 3, "sliced"),
        ("llama3-rope", 2, 2, "sliced"),
        ("gpt2", 1, 2, "sliced"),
    ],
)
def test_answers_are_those_of_one_rank(folders, family, tp, sp, weights):
    options = OPTIONS | {"model": str(folders[family])}
    expected = run_engine(options, requests(), stagger=2)
    found = run_engine(options | {"weights": weights}, requests(), tp=tp, sp=sp, stagger=2)
    assert_same(found, expected)
    alone = run_engine(options | {"weights": weights}, requests()[:1], tp=tp, sp=sp)
    assert_same(alone, expected[:1])
