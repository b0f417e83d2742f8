"""The comparison of two checkouts: its arithmetic, its settings, and one child process."""

from pathlib import Path

import pytest

from benchmarks import two_commits
from benchmarks.generation.checkout import ChildFailed, run_models
from benchmarks.generation.tokens import bundled

ROOT = Path(__file__).resolve().parents[2]


def sample(startup_s, prefill_s, decode_s):
    tokens = {"prefill_tokens": 100, "decode_tokens": 30}
    return {"startup_s": startup_s, "prefill_s": prefill_s, "decode_s": decode_s} | tokens


def test_ratios_are_of_medians_and_within_repeats():
    samples = {
        "before": [sample(1.0, 2.0, 4.0), sample(2.0, 4.0, 8.0), sample(8.0, 8.0, 8.0)],
        "after": [sample(1.0, 1.0, 4.0), sample(2.0, 2.0, 8.0), sample(4.0, 4.0, 4.0)],
    }
    found = two_commits.summary(samples)
    assert found["before"]["prefill_tokens_per_s"] == 25.0
    assert found["after"]["decode_tokens_per_s"] == 7.5
    assert found["ratios"] == {
        "startup_s": {"of_medians": 1.0, "median_within_repeats": 1.0},
        "prefill_s": {"of_medians": 0.5, "median_within_repeats": 0.5},
        "decode_s": {"of_medians": 0.5, "median_within_repeats": 1.0},
    }
    assert "| one | prefill | 4.000 | 2.000 | 0.500 | 0.500 |" in two_commits.table({"one": found})


def test_rounds_share_no_first_block_of_a_prompt(tmp_path):
    chosen = two_commits.settings(tmp_path, rounds=2)
    assert len(chosen) == 4
    for setting in chosen.values():
        first, second = (
            [request["prompt"][:16] for request in batch] for batch in setting["batches"]
        )
        assert not [start for start in second if start in first]


def test_a_result_names_no_folder_of_the_machine():
    given = ["--before", "a/b", "--after=c", "--tokens"]
    assert two_commits.without_folders(given) == [
        *("--before", "BEFORE", "--after", "AFTER", "--tokens")
    ]


def test_a_child_answers_greedily_from_the_checkout_that_it_was_given():
    prompts = bundled(ROOT)
    assert len(prompts["batches"][0]) == 12
    model = prompts | {"sp": 1, "batches": [prompts["batches"][0][:2]] * 2}
    startup_s, answers = run_models(ROOT, [model])
    assert startup_s > 0
    first, second = answers
    assert first["tokens"] == second["tokens"] and len(first["tokens"][0]) > 1
    assert first["decode_tokens"] == sum(map(len, first["tokens"])) - 2
    assert first["prefill_s"] > 0
    assert first["decode_s"] > 0


def test_another_checkout_than_the_one_given_is_refused(tmp_path):
    with pytest.raises(ChildFailed, match="exit code 1"):
        run_models(tmp_path, [])
