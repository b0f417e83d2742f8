"""Scores of given texts: transformers' log-probabilities where attention is exact, and under CSA
the same on any number of ranks."""

from __future__ import annotations

import os

import families
import pytest
import torch
from harness import free_port, run_ranks

from sps2_mega.config import CSAConfig

LENGTHS = (2, 17, 333, 700)
POSITIONS = (0, 1, 15, 16, 40, 331)
DENSE = CSAConfig()
SPARSE = CSAConfig(degrees=(1, 4), spans=(48,), sinks=4, halo=16, tail=8)
BLOCKS = CSAConfig(degrees=(1, 2, 4), spans=(48, 100), sinks=4, halo=16, tail=8, block=16)
PAPER = CSAConfig(degrees=(1, 2, 4), spans=(32, 96), sinks=0, halo=0, tail=0, sample_queries=True)


def score_on_rank(rank: int, port: int, folder: str, tp: int, sp: int, settings, transport="auto"):
    """Per setting the scores of all prompts, from one executor with its weights loaded once."""
    from benchmarks.eval.scoring import executor_with, score_prompt
    from sps2_mega.config import CacheConfig, EngineConfig, ParallelConfig
    from sps2_mega.engine.failing import failing
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.mcore.init import finalize
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    config = EngineConfig(
        model=folder,
        dtype="float32",
        parallel=ParallelConfig(tp=tp, sp=sp),
        cache=CacheConfig(num_blocks=-(-700 // 16 // sp) + 1),
    )
    started = start_rank(config, from_environment(), show_progress=False)
    results = []
    with failing(started.watchdog):
        for csa in settings:
            executor = executor_with(
                started.executor, csa, transport=transport if csa.exact else "auto"
            )
            scores = [
                score_prompt(
                    executor,
                    prompt,
                    row_positions=[p for p in POSITIONS if p < len(prompt)],
                    rows_at_once=37,
                )
                for prompt in families.prompts(LENGTHS, seed=2)
            ]
            results.append([(score.logprobs_T, score.rows_PV) for score in scores])
    started.watchdog.close()
    finalize()
    return results


def scores(folder, tp, sp, settings, transport="auto"):
    """Of all ranks, after checking that they agree to the bit."""
    ranks = run_ranks(
        score_on_rank, tp * sp, free_port(), str(folder), tp, sp, settings, transport, timeout=300
    )
    for other in ranks[1:]:
        for setting, reference in zip(other, ranks[0], strict=True):
            for (logprobs, rows), (wanted, wanted_rows) in zip(setting, reference, strict=True):
                assert torch.equal(logprobs, wanted)
                assert torch.equal(rows, wanted_rows)
    return ranks[0]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Folder and log-probabilities of every position, per family."""
    answers = {}
    for name in ("qwen3", "gpt2"):
        folder = tmp_path_factory.mktemp(name)
        model = families.save_family(name, folder)
        with torch.inference_mode():
            rows = [
                model(torch.tensor([prompt])).logits[0].log_softmax(-1)
                for prompt in families.prompts(LENGTHS, seed=2)
            ]
        answers[name] = (folder, rows)
    return answers


@pytest.mark.parametrize(
    ("name", "tp", "sp", "transport"),
    [
        ("gpt2", 1, 1, "ulysses"),
        ("qwen3", 1, 3, "gather"),  # zigzag: a rank's tokens are two runs
        ("qwen3", 2, 2, "ulysses"),
    ],
)
def test_dense_scores_are_those_of_transformers(oracle, name, tp, sp, transport):
    folder, expected = oracle[name]
    (seen,) = scores(folder, tp, sp, [DENSE], transport)
    for (logprobs, rows), wanted, prompt in zip(
        seen, expected, families.prompts(LENGTHS, seed=2), strict=True
    ):
        targets = torch.tensor(prompt[1:])
        of_next = wanted[:-1].gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(logprobs, of_next.double(), rtol=0, atol=1e-4)
        positions = [p for p in POSITIONS if p < len(prompt)]
        torch.testing.assert_close(rows, wanted[positions], rtol=0, atol=1e-4)


def test_sparse_scores_do_not_depend_on_the_ranks(oracle):
    folder, _ = oracle["qwen3"]
    settings = [SPARSE, PAPER, BLOCKS, DENSE]
    expected = scores(folder, 1, 1, settings)
    for tp, sp in [(1, 4), (2, 2)]:
        for setting, reference in zip(scores(folder, tp, sp, settings), expected, strict=True):
            for (logprobs, rows), (wanted, wanted_rows) in zip(setting, reference, strict=True):
                torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-4)
                torch.testing.assert_close(rows, wanted_rows, rtol=0, atol=1e-4)
    sparse, paper, blocks, dense = (setting[-1][0] for setting in expected)
    assert (sparse - dense).abs().max() > 0.01  # the patterns are really applied
    assert (paper - sparse).abs().max() > 0.01
    assert (blocks - sparse).abs().max() > 0.01
    # Nothing changes for queries whose own cell begins at 0, nor is the tail's first query the
    # body's.
    torch.testing.assert_close(sparse[:48], dense[:48], rtol=0, atol=1e-4)


def refused_on_rank(rank: int, port: int, folder: str):
    from benchmarks.eval.scoring import executor_with, score_prompt
    from sps2_mega.config import CacheConfig, EngineConfig
    from sps2_mega.engine.startup.start_rank import start_rank
    from sps2_mega.errors import ConfigError, RequestError
    from sps2_mega.mcore.init import finalize
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    config = EngineConfig(model=folder, dtype="float32", cache=CacheConfig(num_blocks=3))
    started = start_rank(config, from_environment(), show_progress=False)
    messages = []
    for prompt, positions in [([5], ()), ([1] * 49, ()), ([1, 2, 3], (3,))]:
        with pytest.raises(RequestError) as error:
            score_prompt(started.executor, prompt, row_positions=positions)
        messages.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        executor_with(started.executor, CSAConfig(degrees=(1, 4), spans=(16, 32)))
    messages.append(str(error.value))
    started.watchdog.close()
    finalize()
    return messages


def test_what_cannot_be_scored_is_refused(oracle):
    folder, _ = oracle["qwen3"]
    (messages,) = run_ranks(refused_on_rank, 1, free_port(), str(folder))
    for message, words in zip(
        messages,
        [["2 tokens", "1"], ["49 tokens", "48 tokens"], ["[0, 3)", "[3]"], ["1,4", "16,32"]],
        strict=True,
    ):
        for word in words:
            assert word in message
