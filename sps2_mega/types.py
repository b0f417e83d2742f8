"""Plain data that crosses module borders: parameters, sequences, plans and outputs of steps.

No torch here, so the scheduler and the simulator stay importable everywhere.

    SamplingParams -> Sequence -> StepPlan -> (all ranks) -> StepOutput -> RequestOutput
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field

from sps2_mega.errors import RequestError
from sps2_mega.logprobs import PromptLogprobs, TokenLogprob


class FinishReason(enum.StrEnum):
    """End of a sequence. The first two are the OpenAI API's; an aborted sequence has no output, and
    a failed one makes its request an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class ForwardMode(enum.IntEnum):
    PREFILL = 0
    DECODE = 1
    HYBRID = 2  # both in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of token choice, with OpenAI's names and defaults.

    `max_tokens=None` means the rest of the context, 0 that the prompt is computed and nothing
    follows. `top_k=0` means off. `logprobs=k` returns the log-probability of each chosen token and
    of the k most likely ones, `prompt_logprobs=k` those of the prompt's tokens but the first.
    `temperature=0` is greedy. The n-th sample of a request uses a seed derived from `seed` and n.

    Raises:
        RequestError: a value is outside its range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, range_text: str) -> None:
            if not ok:
                given = repr(getattr(self, name))
                given = given if len(given) <= 80 else f"{given[:77]}..."
                raise RequestError(f"{name} must be {range_text}, got {given}")

        def small(value: int) -> bool:
            return 0 <= value < 2**31  # sent to ranks and counted on devices as int32

        need(
            self.max_tokens is None or small(self.max_tokens), "max_tokens", ">= 0 and below 2**31"
        )
        need(0.0 <= self.temperature <= 100.0, "temperature", "in [0, 100]")
        need(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        need(small(self.top_k), "top_k", ">= 0 (0 switches it off) and below 2**31")
        need(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        need(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")
        need(1 <= self.n <= 128, "n", "in [1, 128]")
        # Each new token is compared with all of them.
        need(len(self.stop) <= 64, "stop", "at most 64 strings")
        need(len(self.stop_token_ids) <= 1024, "stop_token_ids", "at most 1024 token ids")
        need(all(self.stop), "stop", "free of empty strings")
        need(all(map(_is_unicode, self.stop)), "stop", "Unicode without lone surrogates")
        need(all(map(small, self.stop_token_ids)), "stop_token_ids", "token ids, 0 or more")
        need(small(self.min_tokens), "min_tokens", ">= 0 and below 2**31")
        # Scores are divided by it: far smaller ones make float32 overflow.
        need(0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", "in [0.01, 100]")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        need(0 <= (self.logprobs or 0) <= 20, "logprobs", "in [0, 20]")
        need(0 <= (self.prompt_logprobs or 0) <= 20, "prompt_logprobs", "in [0, 20]")
        if self.max_tokens is not None:
            within = f"<= max_tokens ({self.max_tokens})"
            need(self.min_tokens <= self.max_tokens, "min_tokens", within)

    @property
    def has_penalties(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def replace(self, **changes: object) -> SamplingParams:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON and Python can spell but UTF-8 cannot."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


@dataclass(slots=True, kw_only=True)
class Sequence:
    """Running token list of one sample of one request; changed by the scheduler only.

    `seed` is always set (derived where the client gave none), so that a preempted or moved sequence
    continues with the same random numbers. `max_tokens` is already resolved. Times are seconds of
    `time.monotonic()`; `token_times[i]` is when output token i was committed. `num_cached_tokens`
    of the prompt were found in the cache when the sequence first ran; `spans` are the CSA spans
    that the topology gave it then (None: as configured). `prompt_logprobs` grow with the chunks of
    its prefill.
    """

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    arrival_time: float
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    scheduled_time: float | None = None
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    spans: tuple[int, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens were requested and are not complete."""
        if self.params.prompt_logprobs is None:
            return False
        known = self.prompt_logprobs
        return known is None or len(known) < len(self.prompt_token_ids) - 1

    def add_prompt_logprobs(self, new: PromptLogprobs) -> None:
        """Add those of one more chunk; a prompt that is computed again starts anew."""
        earlier = self.prompt_logprobs if new.first > 1 else None
        self.prompt_logprobs = new if earlier is None else earlier.followed_by(new)

    def take_token(self, token_id: int, logprob: TokenLogprob | None, now: float) -> None:
        """Append a token committed at `now`; where no tokens are wanted only the time counts."""
        self.token_times.append(now)
        if self.max_tokens == 0:
            return
        self.output_token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens_from(self, position: int) -> list[int]:
        """Prompt and output tokens from a position on, as a new list."""
        outputs_from = max(0, position - len(self.prompt_token_ids))
        return self.prompt_token_ids[position:] + self.output_token_ids[outputs_from:]


@dataclass(frozen=True, slots=True)
class PrefillItem:
    """Tokens [start, end) of one sequence to prefill; earlier ones are cached already.

    A token is sampled after the last one only, in the step with `end == len(token_ids)`. Block b
    holds tokens [b*block_size, ..) on SP rank `block_ranks[b]` under `block_ids[b]`.
    `num_prompt_tokens` < len(token_ids) when a preempted sequence is recomputed: the rest are its
    own earlier outputs. The first `num_shared_tokens` are in blocks that other sequences may use
    too, so this one never writes there. `spans` are the CSA spans to use where they follow from the
    topology; None: as configured.
    """

    seq_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ranks: list[int]
    block_ids: list[int]
    params: SamplingParams
    seed: int
    start: int
    end: int
    num_shared_tokens: int = 0
    spans: tuple[int, ...] | None = None

    @property
    def num_new_tokens(self) -> int:
        """Tokens that this step computes."""
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether this step ends with a new token."""
        return self.end == len(self.token_ids)


@dataclass(frozen=True, slots=True)
class DecodeItem:
    """One new token of one sequence: `token_id` enters at `position`. `new_block` is (SP rank,
    block id) when `position` opens a block, else None. The SP rank that holds the block of
    `position` runs this sequence's linear layers in this step, so its new key and value never
    travel."""

    seq_id: int
    token_id: int
    position: int
    new_block: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """Layers [first, end) of the prefill pass `pass_id`, which takes some tokens through the model.

    Ranks keep the pass from its first slice, whose plan has the items, to its last one, after which
    `sampled` get a token. A `chunked` pass has one item, and its slices may begin and end inside a
    layer: tokens of layer `first` before position `first_token` were computed by earlier slices,
    and layer `end` is computed up to `end_token`. 0: a layer's beginning.
    """

    pass_id: int
    first: int
    end: int
    sampled: tuple[int, ...] = ()
    chunked: bool = False
    first_token: int = 0
    end_token: int = 0

    @property
    def begins(self) -> bool:
        """Whether this is the first slice of its pass."""
        return self.first == 0 and self.first_token == 0

    def chunks(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Chunks (layer, first token, end token) of a prompt's tokens [start, end), in order."""
        bounds = [(layer, start, end) for layer in range(self.first, self.end)]
        if self.end_token:
            bounds.append((self.end, start, self.end_token))
        if self.first_token:
            layer, _, stop = bounds[0]
            bounds[0] = layer, self.first_token, stop
        return bounds


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, executed by every rank: `prefills`, `decodes` or, as `mode` says, both, of
    different sequences.

    `released` are sequences whose state ranks drop before the step (finished, aborted or
    preempted), `dropped` are passes that they forget. `layers` is the part of a pass that the step
    runs, with `prefills` in the first slice only; None: all layers at once.
    """

    step: int
    mode: ForwardMode
    prefills: list[PrefillItem]
    decodes: list[DecodeItem]
    released: list[int]
    layers: LayerSlice | None = None
    dropped: list[int] = field(default_factory=list)

    @property
    def sampled(self) -> list[int]:
        """Sequences that get a token, in the order of the step's output: prefills, then decodes."""
        if self.layers is not None:
            ids = list(self.layers.sampled)
        else:
            ids = [item.seq_id for item in self.prefills if item.samples]
        return ids + [item.seq_id for item in self.decodes]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One token per sequence in `StepPlan.sampled`, in that order. A token is None where the model
    gave no finite logits: that sequence has failed, the others go on. `logprobs[i]` is None unless
    requested. `prompt_logprobs`, by sequence, are those of the prompt tokens that follow the tokens
    of the step's pass, where requested."""

    token_ids: list[int | None]
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
