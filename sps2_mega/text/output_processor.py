"""Outputs that clients see, from the tokens of finished sequences.

Feeds stop string searches and streams while tokens arrive, turns tokens into text, and puts the n
samples of a request together. The scheduler decides all other ends of a sequence; timings are
defined in `metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sps2_mega.errors import RequestError
from sps2_mega.logprobs import PromptLogprobs
from sps2_mega.metrics import timings_of
from sps2_mega.outputs import Completion, OutputDelta, RequestOutput
from sps2_mega.text.detokenizer import detokenizer, output_text
from sps2_mega.text.stop_strings import StopSearch
from sps2_mega.text.text_stream import TextStream
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason, SamplingParams, Sequence

_NOT_FINITE = (
    "the model produced no finite logits: its weights are damaged, or activations overflow in this "
    "dtype"
)


class OutputProcessor:
    """Every sequence added is answered exactly once: with its request's last sample, or dropped."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}
        self._request_of: dict[int, _Request] = {}
        self._searches: dict[int, StopSearch] = {}
        self._streams: dict[int, TextStream] = {}
        self._deltas: list[OutputDelta] = []

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sequences: list[Sequence],
        *,
        stream: bool = False,
    ) -> None:
        """Take a request's n sequences, in the order of their samples. With `stream`, `take_deltas`
        reports what each step adds.

        Raises:
            RequestError: stop strings were given and there is no tokenizer to find them with.
        """
        if params.stop and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this model was loaded without one"
            )
        request = _Request(
            request_id, prompt_token_ids, [sequence.seq_id for sequence in sequences]
        )
        self._requests[request_id] = request
        for sequence in sequences:
            self._request_of[sequence.seq_id] = request
            if params.stop and self._tokenizer is not None:
                self._searches[sequence.seq_id] = StopSearch(
                    detokenizer(self._tokenizer, prompt_token_ids), params
                )
            if stream:
                self._streams[sequence.seq_id] = TextStream(
                    self._tokenizer, prompt_token_ids, params.stop
                )

    def check_stop(self, sequence: Sequence) -> bool:
        """Whether the token just committed completes a stop string. Call once per token.

        A token that already ended the sequence has no text to search.
        """
        search = self._searches.get(sequence.seq_id)
        if search is None or not sequence.output_token_ids:
            return False
        if sequence.finish_reason is FinishReason.STOP:
            return False
        return search.push(sequence.output_token_ids[-1], len(sequence.output_token_ids))

    def stream(self, sequence: Sequence) -> None:
        """Note the token just committed for `take_deltas`; once per token while a sequence runs."""
        stream = self._streams.get(sequence.seq_id)
        if stream is not None:
            text = stream.push(sequence.output_token_ids[-1])
            self._note(stream, sequence, text, sequence.finish_reason)

    def take_deltas(self) -> list[OutputDelta]:
        """Additions to streamed requests since the last call, in order."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def finished(self, sequence: Sequence) -> RequestOutput | None:
        """Take an ended sequence; return its request's output with the last sample."""
        completion = self._completion(sequence, self._request_of[sequence.seq_id])
        stream = self._streams.pop(sequence.seq_id, None)
        if stream is not None and completion.finish_reason is not FinishReason.ERROR:
            self._note(stream, sequence, stream.rest(completion.text), completion.finish_reason)
        request = self._request_of.pop(sequence.seq_id)
        request.completions[sequence.seq_id] = completion
        if sequence.seq_id == request.seq_ids[0]:
            request.num_cached_tokens = sequence.num_cached_tokens
            request.prompt_logprobs = sequence.prompt_logprobs
        if len(request.completions) < len(request.seq_ids):
            return None
        del self._requests[request.request_id]
        completions = [request.completions[seq_id] for seq_id in request.seq_ids]
        failed = any(c.finish_reason is FinishReason.ERROR for c in completions)
        return RequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            completions=[] if failed else completions,
            error=_NOT_FINITE if failed else None,
            num_cached_tokens=request.num_cached_tokens,
            prompt_logprobs=request.prompt_logprobs,
        )

    def drop(self, request_id: str) -> None:
        """Forget a request that will have no output; unknown ids are fine."""
        request = self._requests.pop(request_id, None)
        for seq_id in request.seq_ids if request else ():
            self._request_of.pop(seq_id, None)
            self._searches.pop(seq_id, None)
            self._streams.pop(seq_id, None)

    def _note(
        self, stream: TextStream, sequence: Sequence, text: str, reason: FinishReason | None
    ) -> None:
        request = self._request_of[sequence.seq_id]
        new = stream.new_tokens(len(sequence.output_token_ids))
        self._deltas.append(
            OutputDelta(
                request_id=request.request_id,
                index=request.seq_ids.index(sequence.seq_id),
                text=text,
                token_ids=sequence.output_token_ids[new],
                logprobs=None if sequence.params.logprobs is None else sequence.logprobs[new],
                finish_reason=reason,
                prompt_logprobs=None if new.start else sequence.prompt_logprobs,
            )
        )

    def _completion(self, sequence: Sequence, request: _Request) -> Completion:
        assert sequence.finish_reason is not None
        search = self._searches.pop(sequence.seq_id, None)
        stopped = search.found if search is not None else None
        return Completion(
            index=request.seq_ids.index(sequence.seq_id),
            text=self._text(sequence) if stopped is None else stopped,
            token_ids=list(sequence.output_token_ids),
            # A stop string may be complete with the very token that also reached max_tokens.
            finish_reason=sequence.finish_reason if stopped is None else FinishReason.STOP,
            logprobs=None if sequence.params.logprobs is None else list(sequence.logprobs),
            timings=timings_of(sequence),
        )

    def _text(self, sequence: Sequence) -> str:
        if self._tokenizer is None:
            return ""
        ids = sequence.output_token_ids
        # No stop string was found: an end token ended the text, whoever named it.
        ended_by_token = sequence.finish_reason is FinishReason.STOP
        if ended_by_token and not sequence.params.include_stop_str_in_output:
            ids = ids[:-1]
        return output_text(self._tokenizer, sequence.prompt_token_ids, ids)


@dataclass(slots=True)
class _Request:
    request_id: str
    prompt_token_ids: list[int]
    seq_ids: list[int]
    completions: dict[int, Completion] = field(default_factory=dict)
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
