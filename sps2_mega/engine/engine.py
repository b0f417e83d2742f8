"""Driver of a job without separate decode ranks: requests in, finished requests out, step by step.

Rank 0 drives: plan -> broadcast -> every rank executes -> commit. The other ranks are Followers.

    add_request -> Scheduler.plan -> StepPlan -> broadcast -> Executor.execute (all ranks)
    RequestOutput <- RequestLedger <- Scheduler.commit <- StepOutput
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.comm.collectives import broadcast_bytes
from sps2_mega.config import ModelConfig
from sps2_mega.engine.failing import failing
from sps2_mega.engine.follower import SHUTDOWN, execute_step
from sps2_mega.engine.requests import RequestLedger
from sps2_mega.engine.stats import EngineStats, KVUse
from sps2_mega.errors import Refusal
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.scheduler.plan_codec import encode
from sps2_mega.scheduler.scheduler import Scheduler
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import ForwardMode, SamplingParams, Sequence, StepPlan
from sps2_mega.worker.overlap_scheduling import OverlapScheduler

if TYPE_CHECKING:
    from sps2_mega.engine.startup.start_rank import StartedRank
    from sps2_mega.mcore.gpt import GPT


class Engine:
    """Rank 0 of a running job.

    An exception inside a step ends the whole job: ranks that disagree about a step cannot go on.
    """

    def __init__(
        self, rank: StartedRank, scheduler: Scheduler, tokenizer: Tokenizer | None
    ) -> None:
        """`scheduler` plans for all ranks of the job, of which `rank` is the first."""
        assert rank.groups.global_rank == 0, "only rank 0 takes requests"
        self.config = rank.config
        self.model_config: ModelConfig = rank.resolved.config
        self.tokenizer = tokenizer
        self.max_model_len = scheduler.limits.max_len
        self._rank, self._scheduler = rank, scheduler
        self._requests = RequestLedger(
            tokenizer,
            scheduler.limits,
            default_seed=rank.config.seed,
            max_waiting=rank.config.scheduler.max_waiting,
        )
        self._overlap = OverlapScheduler(rank.executor, self._plan)
        self._prefill_comm = CommSeconds()
        self._closed = False

    @property
    def model(self) -> GPT:
        """This rank's model, for measurements."""
        return self._rank.executor.model

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        stream: bool = False,
    ) -> Refusal | None:
        """Queue a request, or refuse it; see `RequestLedger.add`.

        Raises:
            RequestError: stop strings were given and there is no tokenizer.
        """
        samples = self._requests.add(
            request_id,
            prompt_token_ids,
            params,
            num_waiting=self._scheduler.num_waiting,
            arrival_time=arrival_time,
            stream=stream,
        )
        if isinstance(samples, Refusal):
            return samples
        for sample in samples:
            self._scheduler.queue(sample)
        return None

    def refusal(self, prompt_token_ids: list[int], params: SamplingParams) -> Refusal | None:
        """Reason why a request could never run; safe in any thread."""
        return self._requests.refusal(prompt_token_ids, params)

    def take_deltas(self) -> list[OutputDelta]:
        """Additions to streamed requests since the last call, in order."""
        return self._requests.take_deltas()

    def abort(self, request_id: str) -> bool:
        """Drop a request in any state, without an output; False when it is not in flight."""
        samples = self._requests.drop(request_id)
        for sample in samples:
            self._scheduler.abort(sample.seq_id)
        return bool(samples)

    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._scheduler.has_work or self._overlap.has_begun

    def stats(self) -> EngineStats:
        """Snapshot between two steps."""
        return self._requests.stats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_pools=(
                KVUse(
                    pool=self._rank.pool.name,
                    blocks_per_rank=self._rank.num_blocks,
                    used_per_rank=self._scheduler.kv_used_per_rank,
                ),
            ),
            prefill_comm=self._prefill_comm,
        )

    def step(self) -> list[RequestOutput]:
        """Run one step on all ranks and return the requests that finished in it.

        The next step may have begun by then (`overlap_scheduling`).
        """
        self._requests.begin_turn()
        with failing(self._rank.watchdog):
            begun = self._overlap.take()
            plan = self._plan() if begun is None else begun.plan
            if plan is None:
                return []
            # A rank that does not take the plan keeps rank 0 here: the step has begun.
            self._rank.watchdog.step_begin(plan.step, plan.mode.name.lower())
            if self._rank.groups.control.size > 1:
                broadcast_bytes(encode(plan), self._rank.groups.control)
            output = execute_step(self._rank, plan, None if begun is None else begun.launched)
            if plan.mode is not ForwardMode.DECODE:
                self._prefill_comm += self._rank.executor.prefill_comm
            now = time.monotonic()
            ended = self._scheduler.commit(plan, output, now)
            sampled = self._requests.live(plan.sampled)
            self._requests.count_step(now, sampled)
            self._requests.count_prompts(plan.prefills)
            self._overlap.begin_next()
            return self._answer(sampled, ended)

    def shutdown(self) -> None:
        """End the job on all ranks; requests in flight are dropped. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with failing(self._rank.watchdog):
            broadcast_bytes(SHUTDOWN, self._rank.groups.control)
        self._rank.leave()

    def _plan(self) -> StepPlan | None:
        return self._scheduler.plan(time.monotonic())

    def _answer(self, sampled: list[Sequence], ended: list[Sequence]) -> list[RequestOutput]:
        """Note each sampled sequence's token, and answer requests whose last sample ended.

        `ended` are those that the scheduler ended; a stop string ends others here.
        """
        for sequence in sampled:
            is_running = sequence.finish_reason is None
            reason = self._requests.note_token(sequence)
            if is_running and reason is not None:
                self._scheduler.finish(sequence.seq_id, reason)
                ended.append(sequence)
        return [output for sequence in ended for output in self._requests.end(sequence)]
