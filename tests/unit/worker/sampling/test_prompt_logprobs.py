"""Log-probabilities of prompt tokens from parts of the vocabulary, at any placement."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from sps2_mega.logprobs import PromptLogprobs
from sps2_mega.types import PrefillItem, SamplingParams, Sequence
from sps2_mega.worker.sampling.prompt_logprobs import _by_sequence, _merged, _scored_runs, _summary


@pytest.mark.parametrize(
    ("vocab_size", "shard"),
    [(10, 10), (10, 5), (10, 4), (3, 2), (3, 4), (257, 128)],  # parts with one token, or none
)
@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_parts_of_the_vocabulary_give_the_whole_log_softmax(vocab_size, shard, num_top):
    torch.manual_seed(vocab_size)
    logits = 30 * torch.randn(7, vocab_size)
    following = torch.randint(vocab_size, (7,))
    following[0] = vocab_size - 1
    firsts = range(0, max(vocab_size, 3 * shard), shard)  # at least one part beyond its end
    parts = [
        _summary(logits[:, first : first + shard], first, following, num_top) for first in firsts
    ]
    merged = _merged(torch.stack(parts, 1), num_top)
    whole = logits.double().log_softmax(-1)
    own = whole.gather(1, following[:, None])[:, 0]
    torch.testing.assert_close(merged[:, 0], own, rtol=0, atol=1e-5)
    top, ids = whole.topk(num_top)
    torch.testing.assert_close(merged[:, 1 : 1 + num_top], top, rtol=0, atol=1e-5)
    assert torch.equal(merged[:, 1 + num_top :].long(), ids)
    for row, token in zip(merged, following.tolist(), strict=True):
        by_id = dict(zip(row[1 + num_top :].tolist(), row[1 : 1 + num_top].tolist(), strict=True))
        assert by_id.get(token, row[0].item()) == row[0].item(), "the same bits in both places"


def test_numbers_that_are_not_finite_stay_in_their_rows():
    logits = torch.zeros(3, 4)
    logits[1] = torch.nan
    merged = _merged(_summary(logits, 0, torch.tensor([0, 1, 2]), 2)[:, None], 2)
    assert merged[1, 0].isnan()
    assert merged[[0, 2], 0].tolist() == pytest.approx([-1.3862944] * 2)


def item(seq_id, num_tokens, block_ranks, *, start=0, end=None, scored=1, outputs=0):
    return PrefillItem(
        seq_id,
        list(range(num_tokens + outputs)),
        num_tokens,
        block_ranks,
        list(range(len(block_ranks))),
        SamplingParams(prompt_logprobs=scored),
        0,
        start=start,
        end=num_tokens + outputs if end is None else end,
    )


def test_rows_find_their_positions_wherever_tokens_lie():
    """Blocks of 4 tokens on 3 ranks, the last of which has none of the scored ones."""
    items = [
        item(5, 11, [1, 0, 1]),
        item(6, 8, [2, 2], scored=None),
        item(7, 1, [0]),
        item(8, 14, [0, 1, 0, 1], start=5, end=10, scored=0),  # a chunk inside of blocks
        item(9, 6, [1, 0, 0], outputs=3),  # recomputed with what it has said
    ]
    runs = _scored_runs(items, block_size=4, sp_size=3)
    assert runs[2] == []
    # Each row says its own position; local rows are counted over all items of a rank.
    rows = [[r, r, 100 + r] for part in runs for run in part for r in range(run.start, run.end)]
    scores = _by_sequence(np.array(rows, dtype=np.float64), items, runs)
    assert scores.keys() == {5, 7, 8, 9}
    assert list(scores[5].own) == list(range(10)) and scores[5].first == 1
    assert (len(scores[7]), scores[7].first) == (0, 1)
    assert (list(scores[8].own), scores[8].first, scores[8].num_top) == ([5, 6, 7, 8, 9], 6, 0)
    assert list(scores[9].own) == [0, 1, 2, 3, 4]
    assert scores[9].entry(2, 17).top == ((102, 2.0),)


def test_chunks_follow_each_other_and_a_second_beginning_replaces_the_first():
    def chunk(first, count):
        own = array("f", range(first, first + count))
        return PromptLogprobs(
            first=first, num_top=1, own=own, top_ids=array("i", [3] * count), top=own
        )

    sequence = Sequence(
        seq_id=0,
        prompt_token_ids=[1] * 6,
        params=SamplingParams(prompt_logprobs=1),
        seed=0,
        max_tokens=1,
        arrival_time=0.0,
    )
    for first, count in ((1, 2), (1, 3), (4, 2)):
        assert sequence.needs_prompt_logprobs
        sequence.add_prompt_logprobs(chunk(first, count))
    assert not sequence.needs_prompt_logprobs
    assert list(sequence.prompt_logprobs.own) == [1.0, 2.0, 3.0, 4.0, 5.0]
    with pytest.raises(AssertionError, match="not followed by 9"):
        sequence.add_prompt_logprobs(chunk(9, 1))
