"""Common prefixes as the scheduler plans them: sharing, waiting, reuse, and cost."""

import pytest
from scheduled_ranks import Ranks

from sps2_mega.config import CSAConfig
from sps2_mega.kv_cache.block_chain import chain_root, extend_chain
from sps2_mega.scheduler.prefix_sharing import spans_fit
from sps2_mega.types import FinishReason, StepOutput
from tests.unit.scheduler.shared_prefixes import BLOCK, scheduler_of, sequence_of, step, text


def run(scheduler, *sequences, ranks=None):
    """Run sequences to their ends; return their first prefill items by id."""
    for sequence in sequences:
        assert scheduler.add(sequence) is None
    items = {}
    while scheduler.has_work:
        for item in step(scheduler, ranks).prefills:
            items.setdefault(item.seq_id, item)
    return items


@pytest.mark.parametrize(
    ("length", "found"), [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (30, 28), (32, 28)]
)
def test_full_blocks_are_found_and_one_token_is_always_computed(length, found):
    scheduler = scheduler_of()
    first = run(scheduler, sequence_of(1, text(length)))[1]
    again = run(scheduler, sequence_of(2, text(length)))[2]
    assert (first.start, again.start) == (0, found)
    assert again.end == length and again.num_shared_tokens == found
    blocks = found // BLOCK
    assert again.block_ids[:blocks] == first.block_ids[:blocks]
    assert again.block_ranks[:blocks] == first.block_ranks[:blocks]


def test_a_second_turn_finds_the_answer_too():
    scheduler = scheduler_of()
    first = sequence_of(1, text(10), max_tokens=15)
    run(scheduler, first)
    # The last token of an answer was never fed, so 24 of the 25 tokens are cached: 6 blocks.
    second = sequence_of(2, first.prompt_token_ids + first.output_token_ids + text(5, 1))
    assert run(scheduler, second)[2].start == 24
    assert second.num_cached_tokens == 24 and first.num_cached_tokens == 0


def test_another_beginning_shares_nothing_and_a_later_difference_what_precedes_it():
    scheduler = scheduler_of()
    prompt = text(40)
    run(scheduler, sequence_of(1, prompt))
    other = [prompt[0] ^ 1, *prompt[1:]]
    assert run(scheduler, sequence_of(2, other))[2].start == 0
    changed = [*prompt[:22], prompt[22] ^ 1, *prompt[23:]]
    assert run(scheduler, sequence_of(3, changed))[3].start == 20


def test_samples_of_one_request_wait_for_the_first_and_others_go_ahead():
    scheduler = scheduler_of()
    prompt = text(9)
    for seq_id in range(3):
        scheduler.add(sequence_of(seq_id, prompt))
    scheduler.add(sequence_of(3, text(9, 1)))
    assert [item.seq_id for item in step(scheduler).prefills] == [0, 3]
    plan = step(scheduler)
    assert [(item.seq_id, item.start) for item in plan.prefills] == [(1, 8), (2, 8)]
    assert scheduler._ledger.num_blocks - scheduler._ledger.num_free == 2 + 3 + 3


def test_under_sarathi_they_wait_until_the_whole_prompt_is_there():
    scheduler = scheduler_of(policy="sarathi", chunk_tokens=8)
    for seq_id in range(3):
        scheduler.add(sequence_of(seq_id, text(21)))
    plans = [step(scheduler) for _ in range(4)]
    first = [[(item.seq_id, item.start, item.end) for item in plan.prefills] for plan in plans]
    assert first == [[(0, 0, 8)], [(0, 8, 16)], [(0, 16, 21)], [(1, 20, 21), (2, 20, 21)]]
    assert [len(plan.decodes) for plan in plans] == [0, 0, 0, 1]


def test_nobody_waits_where_no_full_block_would_be_shared():
    scheduler = scheduler_of()
    for seq_id in range(3):
        scheduler.add(sequence_of(seq_id, text(4)))
    assert len(step(scheduler).prefills) == 3


@pytest.mark.parametrize("how", ["aborted", "failed"])
def test_who_waits_computes_itself_when_the_first_is_gone(how):
    scheduler, ranks = scheduler_of(), Ranks(BLOCK, 64, 2)
    for seq_id in (1, 2):
        scheduler.add(sequence_of(seq_id, text(13)))
    if how == "failed":
        step(scheduler, ranks, failing=(1,))
    else:
        plan = scheduler.plan(0.0)
        ranks.execute(plan)
        scheduler.abort(1)
        scheduler.commit(plan, StepOutput([5], [None]), 1.0)
    (item,) = step(scheduler, ranks).prefills
    assert (item.seq_id, item.start) == (2, 0)


def test_blocks_of_a_failed_sequence_are_never_found():
    scheduler = scheduler_of()
    sequence = sequence_of(1, text(6), max_tokens=30)
    scheduler.add(sequence)
    for _ in range(6):
        step(scheduler)
    # Tokens 0..10 are cached; the step that feeds token 11 fills block 2 and fails.
    step(scheduler, failing=(1,))
    assert sequence.finish_reason is FinishReason.ERROR
    prompt = sequence.prompt_token_ids + sequence.output_token_ids + [1, 2, 3]
    assert run(scheduler, sequence_of(2, prompt))[2].start == 8


def test_a_preempted_sequence_finds_its_own_blocks():
    scheduler, ranks = scheduler_of(num_blocks=7, sp_size=1), Ranks(BLOCK, 7, 1)
    sequences = [sequence_of(seq_id, text(9, seq_id), max_tokens=12) for seq_id in (1, 2)]
    for sequence in sequences:
        scheduler.add(sequence)
    starts = []
    while scheduler.has_work:
        starts += [i.start for i in step(scheduler, ranks).prefills if i.seq_id == 2]
    assert sequences[1].num_preemptions >= 1
    assert starts[0] == 0 and max(starts[1:]) >= BLOCK
    assert sequences[1].num_cached_tokens == 0, "what it had itself is not a prefix found"


def test_eviction_takes_the_least_recently_used_from_its_end():
    scheduler, ranks = scheduler_of(num_blocks=8, sp_size=1), Ranks(BLOCK, 8, 1)
    run(scheduler, sequence_of(1, text(13, 1), max_tokens=1), ranks=ranks)  # 3 full blocks stay
    run(scheduler, sequence_of(2, text(13, 2), max_tokens=1), ranks=ranks)
    # 4 blocks are wanted, 2 are empty: the end of text 1 goes.
    run(scheduler, sequence_of(3, text(13, 3), max_tokens=1), ranks=ranks)
    assert run(scheduler, sequence_of(4, text(13, 2), max_tokens=1), ranks=ranks)[4].start == 12
    assert run(scheduler, sequence_of(5, text(13, 1), max_tokens=1), ranks=ranks)[5].start == 4


def test_an_aligned_prompt_again_and_its_answer_after_the_shared_blocks():
    """The last full block is computed a second time; what follows it is found all the same."""
    scheduler, ranks = scheduler_of(), Ranks(BLOCK, 64, 2)
    run(scheduler, sequence_of(1, text(12), max_tokens=1), ranks=ranks)
    again = sequence_of(2, text(12), max_tokens=9)
    assert run(scheduler, again, ranks=ranks)[2].start == 8
    third = sequence_of(3, again.prompt_token_ids + again.output_token_ids)
    assert run(scheduler, third, ranks=ranks)[3].start == 20


def test_spans_from_the_ranks_are_taken_over_unless_their_cells_are_much_smaller():
    scheduler = scheduler_of(spans_of=lambda length: (-(-length // 2),))
    prompt = text(200)
    assert run(scheduler, sequence_of(1, prompt[:20]))[1].spans == (10,)
    longer = run(scheduler, sequence_of(2, prompt[:40]))[2]
    assert (longer.spans, longer.start) == ((10,), 20)
    far_longer = run(scheduler, sequence_of(3, prompt))[3]
    assert (far_longer.spans, far_longer.start) == ((100,), 0)
    short = run(scheduler, sequence_of(4, prompt[:60]))[4]
    assert (short.spans, short.start) == ((100,), 56), "the longest that fits"


@pytest.mark.parametrize(
    ("recorded", "own", "fit"),
    [
        (None, None, True),
        ((4,), None, False),
        ((4,), (8,), True),
        ((4,), (9,), False),
        ((100, 9), (8, 20), False),
        ((100, 10), (8, 20), True),
    ],
)
def test_which_spans_fit(recorded, own, fit):
    assert spans_fit(recorded, own) is fit


def test_names_of_blocks_depend_on_settings_and_on_everything_before():
    def chain(tokens, root):
        digests = []
        extend_chain(digests, tokens, root=root, block_size=BLOCK)
        return digests

    exact = chain_root(CSAConfig(sinks=5))
    assert exact == chain_root(CSAConfig())
    sparse = chain_root(CSAConfig(degrees=(1, 4)))
    assert len({exact, sparse, chain_root(CSAConfig(degrees=(1, 4), halo=0))}) == 3
    tokens = text(19)
    digests = chain(tokens, exact)
    assert len(digests) == 4 and len(chain(tokens[:3], exact)) == 0
    assert not set(digests) & set(chain(tokens, sparse))
    assert not set(digests) & set(chain([*tokens[:3], tokens[3] + 1, *tokens[4:]], exact))
    grown = chain(tokens[:8], exact)
    extend_chain(grown, tokens[8:], root=exact, block_size=BLOCK)
    assert grown == digests
