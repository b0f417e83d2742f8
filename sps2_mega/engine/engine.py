"""The engine as its users see it: requests in, finished requests out, one step at a time.

Rank 0 drives: plan -> broadcast -> every rank executes -> commit. The other ranks follow in
`run_worker`.

    add_request -> Scheduler.plan -> StepPlan -> broadcast -> Executor.execute (all ranks)
    RequestOutput <- OutputProcessor <- Scheduler.commit <- StepOutput
"""

from __future__ import annotations

import time

from sps2_mega.attention.pipeline.metrics import CommSeconds
from sps2_mega.comm.collectives import broadcast_bytes
from sps2_mega.config import EngineConfig, ModelConfig
from sps2_mega.engine.fan_out import fan_out
from sps2_mega.engine.startup.scheduler_setup import make_scheduler
from sps2_mega.engine.startup.start_rank import StartedRank, failing, start_rank
from sps2_mega.engine.stats import EngineStats, KVUse
from sps2_mega.errors import Refusal
from sps2_mega.mcore.gpt import GPT
from sps2_mega.mcore.init import finalize
from sps2_mega.metrics import TokenWaits, waits_ended_at
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.scheduler.plan_codec import decode, encode
from sps2_mega.text.output_processor import OutputProcessor
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import (
    FinishReason,
    ForwardMode,
    SamplingParams,
    Sequence,
    StepOutput,
    StepPlan,
)
from sps2_mega.worker.executor import Launched
from sps2_mega.worker.overlap_scheduling import OverlapScheduler

_SHUTDOWN = b""


class Engine:
    """One rank of a running job. Only rank 0 (`is_driver`) takes requests; the others `run_worker`.

    An exception inside a step ends the whole job: ranks that disagree about a step cannot go on.
    """

    @classmethod
    def start(cls, config: EngineConfig, *, show_progress: bool = False) -> Engine:
        """Join the job described by the launcher's environment; to be called on every rank.

        Raises:
            ConfigError, CheckpointError: the configuration or the checkpoint cannot work.
        """
        info = from_environment()
        return cls(start_rank(config, info, show_progress=show_progress and info.rank == 0))

    def __init__(self, rank: StartedRank) -> None:
        self.config = rank.config
        self.model_config: ModelConfig = rank.resolved.config
        self.is_driver = rank.groups.global_rank == 0
        self.tokenizer: Tokenizer | None = None
        self._rank = rank
        self._executor, self._control = rank.executor, rank.groups.control
        self._closed = False
        self._prefill_comm = CommSeconds()
        if not self.is_driver:
            self.max_model_len = rank.max_model_len
            return
        if rank.resolved.tokenizer is not None:
            self.tokenizer = Tokenizer.load(rank.resolved.tokenizer)
        self._scheduler = make_scheduler(rank)
        self._ahead = OverlapScheduler(rank.executor, self._plan)
        self.max_model_len = self._scheduler.max_len
        self._outputs = OutputProcessor(self.tokenizer)
        self._samples: dict[str, list[Sequence]] = {}
        self._sequences: dict[int, Sequence] = {}
        self._next_seq_id = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._num_steps, self._last_waits = 0, TokenWaits()

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        stream: bool = False,
    ) -> Refusal | None:
        """Queue a request, or say why not. `arrival_time` is of time.monotonic(), default now. Of a
        streamed request `take_deltas` tells what each step adds.

        Raises:
            RequestError: stop strings were given and there is no tokenizer.
        """
        if request_id in self._samples:
            return Refusal.DUPLICATE_ID
        samples = fan_out(
            request_id,
            prompt_token_ids,
            params,
            first_seq_id=self._next_seq_id,
            max_len=self.max_model_len,
            default_seed=self.config.seed,
            arrival_time=time.monotonic() if arrival_time is None else arrival_time,
        )
        self._outputs.add(request_id, prompt_token_ids, params, samples, stream=stream)
        for added, sample in enumerate(samples):
            refusal = self._scheduler.add(sample)
            if refusal is not None:
                for earlier in samples[:added]:
                    self._scheduler.abort(earlier.seq_id)
                self._outputs.drop(request_id)
                return refusal
        self._next_seq_id += params.n
        self._samples[request_id] = samples
        self._sequences.update((sample.seq_id, sample) for sample in samples)
        return None

    def refusal(self, prompt_token_ids: list[int], params: SamplingParams) -> Refusal | None:
        """Why such a request could never run; for other threads too, since nothing it reads
        changes."""
        return self._scheduler.refusal(
            Sequence(
                seq_id=-1,
                prompt_token_ids=prompt_token_ids,
                params=params,
                seed=0,
                max_tokens=1 if params.max_tokens is None else params.max_tokens,
                arrival_time=0.0,
            )
        )

    def take_deltas(self) -> list[OutputDelta]:
        """What steps since the last call added to streamed requests, in order."""
        return self._outputs.take_deltas()

    def abort(self, request_id: str) -> bool:
        """Drop a request in any state, without an output; False when it is not in flight."""
        samples = self._samples.pop(request_id, None)
        if samples is None:
            return False
        for sample in samples:
            self._scheduler.abort(sample.seq_id)
            self._sequences.pop(sample.seq_id, None)
        self._outputs.drop(request_id)
        return True

    @property
    def model(self) -> GPT:
        """This rank's model, for measurements."""
        return self._executor.model

    def has_work(self) -> bool:
        return self._scheduler.has_work or self._ahead.has_begun

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_usage=self._scheduler.kv_usage,
            kv_sides=(
                KVUse(
                    side=self._rank.side.name,
                    blocks_per_rank=self._rank.num_blocks,
                    used_per_rank=self._scheduler.kv_used_per_rank,
                ),
            ),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            prefill_comm=self._prefill_comm,
            num_steps=self._num_steps,
            last_waits=self._last_waits,
        )

    def step(self) -> list[RequestOutput]:
        """Run one step on all ranks; returns the requests that finished in it (driver only). The
        next one may have begun then (`overlap_scheduling`)."""
        with failing(self._rank.watchdog):
            begun = self._ahead.take()
            plan = self._plan() if begun is None else begun.plan
            if plan is None:
                return []
            # A rank that does not take the plan keeps rank 0 here: the step has begun.
            self._rank.watchdog.step_begin(plan.step, plan.mode.name.lower())
            if self._control.size > 1:
                broadcast_bytes(encode(plan), self._control)
            output = self._execute(plan, None if begun is None else begun.launched)
            now = time.monotonic()
            ended = self._scheduler.commit(plan, output, now)
            self._num_steps += 1
            self._last_waits = waits_ended_at(now, self._still_here(plan.sampled))
            self._count_prompt_tokens(plan)
            self._output_tokens += self._num_new_tokens(plan.sampled)
            self._ahead.begin_next()
            return self._collect(plan, ended)

    def run_worker(self) -> None:
        """Execute the driver's plans until it shuts down (all ranks but the driver)."""
        with failing(self._rank.watchdog):
            while payload := broadcast_bytes(None, self._control):
                self._execute(decode(payload))
        self._leave()

    def shutdown(self) -> None:
        """End the job on all ranks; requests in flight are dropped. Safe to call twice."""
        if self._closed:
            return
        if self.is_driver:
            with failing(self._rank.watchdog):
                broadcast_bytes(_SHUTDOWN, self._control)
        self._leave()

    def _plan(self) -> StepPlan | None:
        return self._scheduler.plan(time.monotonic())

    def _execute(self, plan: StepPlan, launched: Launched | None = None) -> StepOutput:
        self._rank.watchdog.step_begin(plan.step, plan.mode.name.lower())
        if launched is None:
            output = self._executor.execute(plan)
        else:
            output = self._executor.finish(launched)
        if plan.mode is not ForwardMode.DECODE:
            self._prefill_comm += self._executor.prefill_comm
            if self._rank.trace is not None:
                self._rank.trace.flush()
        self._rank.watchdog.step_end()
        return output

    def _count_prompt_tokens(self, plan: StepPlan) -> None:
        """Outputs that a preempted sequence computes again do not count."""
        for item in plan.prefills:
            prompt = item.num_prompt_tokens
            self._prompt_tokens += min(item.end, prompt) - min(item.start, prompt)
            if item.start == item.num_shared_tokens:
                self._cached_tokens += min(item.start, prompt)

    def _still_here(self, seq_ids: list[int]) -> list[Sequence]:
        """A sequence that was aborted between slices of its group's prefill is sampled with the
        group all the same."""
        return [self._sequences[seq_id] for seq_id in seq_ids if seq_id in self._sequences]

    def _num_new_tokens(self, seq_ids: list[int]) -> int:
        """Of a step with these; some only had their prompts computed."""
        return len(seq_ids) - sum(s.max_tokens == 0 for s in self._still_here(seq_ids))

    def _collect(self, plan: StepPlan, ended: list[Sequence]) -> list[RequestOutput]:
        """Look for stop strings in what goes on, and hand out requests whose last sample ended."""
        for sequence in self._still_here(plan.sampled):
            if sequence.finish_reason is FinishReason.ERROR:
                continue
            if self._outputs.check_stop(sequence) and sequence.finish_reason is None:
                self._scheduler.finish(sequence.seq_id, FinishReason.STOP)
                ended.append(sequence)
            if sequence.finish_reason is None:
                self._outputs.stream(sequence)
        finished = []
        for sequence in ended:
            del self._sequences[sequence.seq_id]
            output = self._outputs.finished(sequence)
            if output is not None:
                del self._samples[output.request_id]
                finished.append(output)
        return finished

    def _leave(self) -> None:
        self._closed = True
        if self._rank.trace is not None:
            with failing(self._rank.watchdog):
                self._rank.trace.finish()
        self._rank.watchdog.close()
        finalize()
