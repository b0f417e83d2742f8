"""Sampling against transformers' processors, the OpenAI formula and the exact distribution."""

import math
import time

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sps2_mega.types import SamplingParams
from sps2_mega.worker.sampling import sampler
from sps2_mega.worker.sampling.penalties import PenaltyState, penalise
from sps2_mega.worker.sampling.sampler import _filtered, draw, sample

GREEDY = SamplingParams(temperature=0.0)
V_SMALL, V_LARGE = 260, 128_000


def logits_of(num_rows, vocab_size, *, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def mixed_params(num_rows):
    choices = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.3, top_p=0.9),
        GREEDY,
        SamplingParams(temperature=0.9, min_p=0.05, logprobs=3),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.8, min_p=0.01),
        SamplingParams(temperature=0.0, logprobs=0),
    ]
    return [choices[i % len(choices)] for i in range(num_rows)]


def test_greedy_takes_the_most_likely_token_whatever_the_filters():
    logits = logits_of(5, V_SMALL)
    params = [
        GREEDY,
        GREEDY.replace(top_k=3),
        GREEDY.replace(top_p=0.1),
        SamplingParams(temperature=1e-7),
    ]
    ids, logprobs = sample(logits[:4], params, [0] * 4, [9] * 4)
    assert ids == logits[:4].argmax(-1).tolist()
    assert logprobs == [None] * 4
    assert sample(logits[:0], [], [], []) == ([], [])


@pytest.mark.parametrize("vocab_size", [V_SMALL, 1024, 1025, 5000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_k=1),
        SamplingParams(temperature=1.5, top_k=37),
        SamplingParams(temperature=1.5, top_k=10**6),
        SamplingParams(temperature=0.8, top_p=0.55),
        SamplingParams(temperature=1.2, top_p=1e-6),
        SamplingParams(temperature=1.2, top_p=0.999),
        SamplingParams(temperature=1.2, min_p=0.1),
        SamplingParams(temperature=1.2, min_p=1.0),
        SamplingParams(temperature=1.1, top_k=64, top_p=0.7, min_p=0.02),
    ],
)
def test_filters_leave_the_distribution_of_the_transformers_warpers(params, scale, vocab_size):
    logits = logits_of(7, vocab_size, scale=scale)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    # In float64, so that the reference's own rounding does not move the border of a nucleus.
    expected = warpers(None, logits.double()).softmax(-1)
    relative = ((logits - logits.amax(-1, keepdim=True)) / params.temperature).exp()
    weights, _ = _filtered(relative, [params] * 7, 1024)
    actual = weights.double() / weights.sum(-1, keepdim=True, dtype=torch.float64)
    kept_differently = ((actual > 0) != (expected > 0)).sum(-1)
    # With nearly equal logits float32 cannot tell which token is on the border of the nucleus.
    assert kept_differently.max() <= (2 if params.top_p < 1.0 and scale < 1.0 else 0)
    torch.testing.assert_close(
        actual, expected, rtol=1e-4, atol=1e-3 if kept_differently.any() else 1e-6
    )


def test_rows_with_different_filters_do_not_disturb_each_other():
    logits = logits_of(28, 3000)
    params = [p.replace(temperature=1.0) for p in mixed_params(28)]
    relative = (logits - logits.amax(-1, keepdim=True)).exp()
    together, _ = _filtered(relative, params, 1024)
    for row in range(28):
        alone, _ = _filtered(relative[row : row + 1], [params[row]], 1024)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1.3), SamplingParams(temperature=1.0, top_k=9, top_p=0.95)],
)
def test_frequencies_follow_the_distribution(params):
    num_draws, vocab_size = 40_000, 13
    logits = logits_of(1, vocab_size, scale=1.2)
    relative = ((logits - logits.max()) / params.temperature).exp()
    expected = _filtered(relative, [params], 1024)[0][0].double()
    expected = expected / expected.sum() * num_draws
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    batch = logits.expand(1000, -1)
    for start in range(0, num_draws, 1000):
        ids, _ = sample(batch, [params] * 1000, [11] * 1000, list(range(start, start + 1000)))
        counts += torch.bincount(torch.tensor(ids), minlength=vocab_size)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = int(possible.sum()) - 1
    # Mean and variance of chi-square are k and 2k; four deviations, with fixed random numbers.
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("vocab_size", [V_SMALL, V_LARGE])
def test_text_does_not_depend_on_the_batch(vocab_size):
    logits = logits_of(16, vocab_size)
    params = mixed_params(16)
    seeds, positions = list(range(100, 116)), list(range(16))
    ids, logprobs = sample(logits, params, seeds, positions)
    assert (ids, logprobs) == sample(logits, params, seeds, positions), "same call, same answer"
    for rows in ([0], [5], [3, 9, 1], list(range(15, -1, -1))):
        some_ids, some_logprobs = sample(
            logits[rows],
            [params[i] for i in rows],
            [seeds[i] for i in rows],
            [positions[i] for i in rows],
        )
        assert some_ids == [ids[i] for i in rows]
        for i, logprob in zip(rows, some_logprobs, strict=True):
            assert (logprob is None) == (logprobs[i] is None)
            if logprob is not None:
                assert logprob.logprob == pytest.approx(logprobs[i].logprob, abs=1e-5)


def test_seed_and_position_matter():
    logits = logits_of(1, V_SMALL, scale=0.5).expand(400, -1)
    params = [SamplingParams()] * 400
    by_position, _ = sample(logits, params, [1] * 400, list(range(400)))
    by_seed, _ = sample(logits, params, list(range(400)), [1] * 400)
    assert len(set(by_position)) > 100 and len(set(by_seed)) > 100 and by_position != by_seed


def test_tokens_without_weight_are_never_chosen():
    logits = torch.full((500, 7), -math.inf)
    logits[:, [2, 5]] = 0.0
    ids, _ = sample(logits, [SamplingParams()] * 500, [3] * 500, list(range(500)))
    assert set(ids) == {2, 5}


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_extreme_random_numbers_choose_possible_tokens(number, monkeypatch):
    monkeypatch.setattr("sps2_mega.worker.sampling.sampler.uniform", lambda seed, position: number)
    logits = logits_of(64, V_SMALL)
    logits[:, [0, 1, V_SMALL - 1]] = -math.inf
    ids, _ = sample(logits, [SamplingParams()] * 64, [0] * 64, [0] * 64)
    assert set(ids) == ({2} if number == 0.0 else {V_SMALL - 2})


def test_a_nucleus_found_too_small_only_when_tokens_are_read_gives_the_same_tokens(monkeypatch):
    logits = logits_of(28, 3000, scale=0.1)
    params = [p.replace(top_p=0.9, logprobs=i % 3) for i, p in enumerate(mixed_params(28))]
    expected = sample(logits, params, list(range(28)), [5] * 28)
    # As on a device where nothing is known before the tokens are read.
    monkeypatch.setattr(sampler, "_is_known_at_once", lambda x: False)
    drawn = draw(logits, params, list(range(28)), [5] * 28)
    assert not all(drawn.chosen_3B[2].tolist())
    assert drawn.tokens() == expected
    steep = 50 * logits
    drawn = draw(steep, params, list(range(28)), [5] * 28)
    assert all(drawn.chosen_3B[2].tolist())
    monkeypatch.undo()
    assert drawn.tokens() == sample(steep, params, list(range(28)), [5] * 28)


def test_a_nucleus_that_is_reached_exactly_takes_no_further_token():
    weights = torch.tensor([[0.25, 1.0, 0.25, 0.5]])
    params = [SamplingParams(top_p=0.5)]
    assert _filtered(weights, params, 4)[0].tolist() == [[0.0, 1.0, 0.0, 0.0]]
    params = [SamplingParams(top_p=0.501)]
    assert _filtered(weights, params, 4)[0].tolist() == [[0.0, 1.0, 0.0, 0.5]]


def test_repetition_penalty_equals_transformers():
    logits = logits_of(2, V_SMALL)
    prompt, output = [5, 9, 9, 200], [7, 5]
    state = PenaltyState(prompt, V_SMALL)
    for token in output:
        state.append(token)
    params = SamplingParams(repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits[:1])
    torch.testing.assert_close(penalise(logits[:1], [params], [state]), expected)
    rebuilt = PenaltyState(prompt, V_SMALL, output_ids=output)
    assert torch.equal(rebuilt.seen, state.seen) and torch.equal(
        rebuilt.output_counts, state.output_counts
    )


def test_presence_and_frequency_penalties_follow_the_openai_formula_over_the_output_only():
    logits = logits_of(1, V_SMALL)
    state = PenaltyState([1, 2, 3], V_SMALL, output_ids=[3, 3, 8])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
    expected = logits.clone()
    for token, count in {3: 2, 8: 1}.items():
        expected[0, token] += -0.5 + 0.25 * count
    torch.testing.assert_close(penalise(logits, [params], [state]), expected)


def test_penalties_reach_only_their_own_row_and_not_the_logprobs():
    logits = torch.zeros(3, 11)
    logits[:, 4], logits[:, 6] = 3.0, 2.0
    before = logits.clone()
    params = [GREEDY, GREEDY.replace(repetition_penalty=9.0, logprobs=2), GREEDY]
    ids, logprobs = sample(logits, params, [0] * 3, [1] * 3, [None, PenaltyState([4], 11), None])
    assert ids == [4, 6, 4]
    assert torch.equal(logits, before)
    raw = logits[1].log_softmax(-1)
    assert logprobs[1].token_id == 6 and logprobs[1].logprob == pytest.approx(raw[6].item())
    assert [token for token, _ in logprobs[1].top] == [4, 6]
    assert [value for _, value in logprobs[1].top] == pytest.approx(raw[[4, 6]].tolist())


def test_a_penalty_without_history_is_a_bug():
    with pytest.raises(AssertionError, match="PenaltyState"):
        sample(torch.zeros(1, 5), [GREEDY.replace(presence_penalty=1.0)], [0], [0])


def test_banned_tokens_are_not_chosen_but_keep_their_logprob():
    logits = torch.zeros(2, 9)
    logits[:, 3] = 50.0
    params = [GREEDY.replace(logprobs=1), SamplingParams(temperature=1.0)]
    ids, logprobs = sample(logits, params, [0] * 2, [0] * 2, banned=[(3, 0), (3,)])
    assert ids[0] == 1 and ids[1] != 3
    assert logprobs[0].top[0][0] == 3 and logprobs[0].top[0][1] == pytest.approx(0.0, abs=1e-6)


def test_logprobs_have_as_many_alternatives_as_asked():
    logits = logits_of(4, V_SMALL)
    params = [SamplingParams(logprobs=k, temperature=2.0) for k in (0, 1, 5, 20)]
    ids, logprobs = sample(logits, params, [1, 2, 3, 4], [0] * 4)
    raw = logits.log_softmax(-1)
    for row, k in enumerate((0, 1, 5, 20)):
        entry = logprobs[row]
        assert entry.token_id == ids[row] and len(entry.top) == k
        assert entry.logprob == pytest.approx(raw[row, ids[row]].item(), abs=1e-5)
        assert [value for _, value in entry.top] == pytest.approx(
            raw[row].topk(max(k, 1)).values.tolist()[:k]
        )


@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(), SamplingParams(top_p=0.5, top_k=4), SamplingParams(logprobs=3)],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_of_broken_logits_has_no_token_and_disturbs_no_other(params, value):
    logits = logits_of(3, V_SMALL)
    expected = sample(logits, [params] * 3, [0] * 3, [0] * 3)
    logits[1] = value
    token_ids, logprobs = sample(logits, [params] * 3, [0] * 3, [0] * 3)
    assert token_ids == [expected[0][0], None, expected[0][2]]
    assert logprobs == [expected[1][0], None, expected[1][2]]
    logits[1] = 0.0
    logits[1, 17] = math.nan
    assert sample(logits, [params] * 3, [0] * 3, [0] * 3)[0] == token_ids


def test_sixteen_greedy_rows_of_a_small_vocabulary_cost_little():
    logits = logits_of(16, V_SMALL)

    def seconds():
        start = time.perf_counter()
        sample(logits, [GREEDY] * 16, [0] * 16, [0] * 16)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(100)) < 0.5e-3
