"""Answers to probes under one attention setting, through the scheduler, prefix cache and model.

Every rank calls with the same arguments: each has its own copy of the scheduler, and since all
ranks see the same sampled tokens, all copies make the same plans. A second turn is a longer prompt
that finds the first one and its answer in the cache, as in a conversation. Decides no setting and
no task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.eval.measure import Job
from benchmarks.eval.scoring import executor_with
from benchmarks.eval.settings import Setting
from benchmarks.eval.tasks import Probe, judge
from sps2_mega.attention.planner.attention_choice import prompt_layout
from sps2_mega.kv_cache.block_chain import chain_root
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import SamplingParams, Sequence


@dataclass(frozen=True, slots=True)
class Verdict:
    """Judgement of one answer: exactness, its right share from the beginning, cached share.

    The cached share is that of the last turn's prompt, 0 for probes of one turn.
    """

    exact: bool
    prefix: float
    cached: float


def answer_probes(
    job: Job,
    setting: Setting,
    probes: list[Probe],
    tokenizer: Tokenizer,
    *,
    on_done: Callable[[], None],
) -> list[Verdict]:
    """Verdicts on each probe's greedy continuation, in order."""
    turns = _Turns(job, setting)
    verdicts = []
    for group in _groups(probes, turns.room):
        prompts = [probe.prompt_ids for probe in group]
        counts = [probe.new_tokens for probe in group]
        sequences = turns.run(prompts, counts)
        asked_again = [number for number, probe in enumerate(group) if probe.question_ids]
        longer = [
            prompts[n] + sequences[n].output_token_ids + group[n].question_ids for n in asked_again
        ]
        second = turns.run(longer, [counts[n] for n in asked_again])
        for number, sequence in zip(asked_again, second, strict=True):
            sequences[number] = sequence
        for probe, sequence in zip(group, sequences, strict=True):
            text = tokenizer.decode(sequence.output_token_ids).lstrip(" ")
            cached = sequence.num_cached_tokens / len(sequence.prompt_token_ids)
            verdicts.append(Verdict(*judge(probe.answer, text), cached))
            on_done()
    return verdicts


class _Turns:
    """Prompts through one scheduler and one cache, in which later prompts find earlier ones."""

    def __init__(self, job: Job, setting: Setting) -> None:
        csa = setting.csa
        self._job = job
        self._executor = executor_with(
            job.started.executor, csa, sparse_decode=setting.sparse_decode
        )
        pool, sp = self._executor.pool, self._executor.groups.sp
        self._scheduler = Scheduler(
            job.config.scheduler,
            block_size=pool.block_size,
            num_blocks=pool.num_blocks,
            sp_size=sp.size,
            max_model_len=job.started.max_model_len,
            vocab_size=self._executor.config.vocab_size,
            layout=prompt_layout(self._executor.prefill.transport, csa),
            prefix_root=chain_root(csa),
        )
        self._num_sequences = 0
        # Half of the cache, so that no first turn is evicted before its second one.
        self.room = pool.num_blocks * sp.size * pool.block_size // 2

    def run(self, prompts: list[list[int]], new_tokens: list[int]) -> list[Sequence]:
        """Greedy sequences, cut short where the model gave no finite logits."""
        sequences = []
        for prompt, count in zip(prompts, new_tokens, strict=True):
            sequence = Sequence(
                seq_id=self._num_sequences,
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True),
                seed=0,
                max_tokens=count,
                arrival_time=0.0,
            )
            self._num_sequences += 1
            refusal = self._scheduler.add(sequence)
            assert refusal is None, f"the lengths were checked before the start: {refusal}"
            sequences.append(sequence)
        while (plan := self._scheduler.plan(time.monotonic())) is not None:
            with self._job.step(plan.mode.name.lower()):
                output = self._executor.execute(plan)
            self._scheduler.commit(plan, output, time.monotonic())
        return sequences


def _groups(probes: list[Probe], room: int) -> Iterator[list[Probe]]:
    """Runs of probes that together need at most `room` tokens of cache; a larger probe is alone."""
    group: list[Probe] = []
    used = 0
    for probe in probes:
        if group and used + probe.length > room:
            yield group
            group, used = [], 0
        group.append(probe)
        used += probe.length
    if group:
        yield group
