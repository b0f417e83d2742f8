r"""OpenAI bodies from a call's outputs and deltas: one JSON object, or server-sent events.

    data: {chunk}\\n\\n   ...   data: {usage chunk}\\n\\n   data: [DONE]\\n\\n
    and ": keep-alive" during silence

After the headers are sent, a failure is an event with an `error`, then the end of the stream.
`responses` forms the bodies of single outputs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sps2_mega.logprobs import PromptLogprobs
from sps2_mega.outputs import OutputDelta, RequestOutput
from sps2_mega.serving.echo import Echo, joined
from sps2_mega.serving.http.api_errors import ApiError
from sps2_mega.serving.http.calls import Call, Delta
from sps2_mega.serving.protocol import Kind
from sps2_mega.serving.responses import (
    TextOffsets,
    chat_body,
    completion_body,
    logprob_entries,
    logprob_lists,
    usage,
)
from sps2_mega.text.tokenizer import Tokenizer

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"
_LARGE = 20_000  # log-probabilities
# One encoder for all: `json.dumps` with options makes a new one each time.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(slots=True, kw_only=True)
class Answer:
    """Builder of an answer's bodies, with the fields that all of them share.

    `echoes` precede each prompt's outputs.
    """

    kind: Kind
    body_id: str
    model: str
    created: int  # Unix seconds
    num_samples: int  # per prompt
    tokenizer: Tokenizer | None
    request_id: str
    echoes: list[Echo] | None = None
    has_prompt_logprobs: bool = False
    include_usage: bool = False
    _offsets: dict[int, TextOffsets] = field(default_factory=dict)
    # By prompt: deltas that arrived before the prompt's own log-probabilities.
    _held: dict[int, list[Delta]] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    _around: tuple[str, str] | None = None

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """Body of an answer that is not streamed. Sample s of prompt p is choice p * n + s."""
        build = chat_body if self.kind == "chat" else completion_body
        bodies = [
            build(
                output,
                body_id=self.body_id,
                model=self.model,
                created=self.created,
                tokenizer=self.tokenizer,
            )
            for output in outputs
        ]
        if self.echoes is not None:
            for body, echo, output in zip(bodies, self.echoes, outputs, strict=True):
                self._put_before(body["choices"], echo, output)
        choices = [choice for body in bodies for choice in body["choices"]]
        for index, choice in enumerate(choices):
            choice["index"] = index
        return bodies[0] | {"choices": choices, "usage": _usage_of_all(outputs)}

    def is_large(self, outputs: list[RequestOutput]) -> bool:
        """Whether building the body takes long enough to delay the streams of others."""
        all_logprobs = (output.prompt_logprobs for output in outputs)
        return sum(len(each) * (1 + each.num_top) for each in all_logprobs if each) > _LARGE

    def _put_before(self, choices: list[dict[str, Any]], echo: Echo, output: RequestOutput) -> None:
        prompt_logprobs = output.prompt_logprobs
        lists = None if prompt_logprobs is None else echo.logprobs(prompt_logprobs)
        for choice, completion in zip(choices, output.completions, strict=True):
            choice["text"] = echo.text + choice["text"]
            if lists is not None:
                new = logprob_lists(
                    completion.logprobs or [], self.tokenizer, echo.output_offsets()
                )
                choice["logprobs"] = joined(lists, new)

    async def events(self, call: Call, *, keep_alive: float) -> AsyncIterator[str]:
        """Server-sent events of a streamed call, from first to last."""
        try:
            if not self.has_prompt_logprobs:
                for index in range(call.num_samples):
                    for opening in self._opening(index):
                        yield self._event([opening])
            async for deltas in call.deltas(silence=keep_alive):
                text = "" if deltas else KEEP_ALIVE
                if self.has_prompt_logprobs:
                    deltas, openings = await self._released(deltas)
                    text += openings
                text += self._choices(deltas)
                if text:
                    yield text
            if self.include_usage:
                outputs = [call.outputs[index] for index in range(len(call.prompts))]
                yield self._event([], usage=_usage_of_all(outputs))
        except ApiError as error:
            yield _data(error.body(self.request_id))
        yield DONE

    def _opening(self, index: int) -> list[dict[str, Any]]:
        """Start of a choice, before its first token."""
        if self.kind == "chat":
            first = {"role": "assistant", "content": "", "refusal": None}
            return [{"index": index, "delta": first, "logprobs": None, "finish_reason": None}]
        if self.echoes is None:
            return []
        text = self.echoes[index // self.num_samples].text
        return [{"index": index, "text": text, "logprobs": None, "finish_reason": None}]

    async def _released(self, deltas: list[Delta]) -> tuple[list[Delta], str]:
        """Deltas whose prompt logprobs are known, and the events that open their choices.

        Deltas are held back until then. Prompt logprobs arrive with the first sample's first
        token, which need not be the first of all samples.
        """
        openings = ""
        released: list[Delta] = []
        for delta in deltas:
            prompt, logprobs = delta.prompt_index, delta.delta.prompt_logprobs
            if logprobs is not None:
                openings += await asyncio.to_thread(self._openings_with_logprobs, prompt, logprobs)
                released += [*self._held.get(prompt, ()), delta]
                self._opened.add(prompt)
            elif prompt in self._opened:
                released.append(delta)
            else:
                self._held.setdefault(prompt, []).append(delta)
        return released, openings

    def _openings_with_logprobs(self, prompt: int, logprobs: PromptLogprobs) -> str:
        assert self.echoes is not None, "only an echo has a place for the logprobs of a prompt"
        echo = self.echoes[prompt]
        opening = {"text": echo.text, "logprobs": echo.logprobs(logprobs), "finish_reason": None}
        first = prompt * self.num_samples
        events = []
        for index in range(first, first + self.num_samples):
            self._offsets[index] = echo.output_offsets()
            events.append(self._event([{"index": index} | opening]))
        return "".join(events)

    def _choices(self, deltas: list[Delta]) -> str:
        """Events of all deltas with content, in one piece: each piece is written separately."""
        before, after = self._frame
        return "".join(
            before + _encode(choice) + after
            for delta in deltas
            if (choice := self._choice(delta)) is not None
        )

    @property
    def _frame(self) -> tuple[str, str]:
        """Text around a choice in an event, the same throughout an answer."""
        if self._around is None:
            # Quotes inside strings are escaped, so this occurs once, whatever the model's name.
            before, opening, after = self._event([{}]).partition('"choices":[')
            self._around = before + opening, after.removeprefix("{}")
        return self._around

    def _choice(self, event: Delta) -> dict[str, Any] | None:
        delta = event.delta
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return None
        index = event.prompt_index * self.num_samples + delta.index
        reason = delta.finish_reason
        end = {
            "logprobs": self._logprobs(index, delta),
            "finish_reason": None if reason is None else reason.value,
        }
        if self.kind == "chat":
            return {"index": index, "delta": {"content": delta.text} if delta.text else {}} | end
        return {"index": index, "text": delta.text} | end

    def _logprobs(self, index: int, delta: OutputDelta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        if self.kind == "chat":
            return logprob_entries(delta.logprobs, self.tokenizer)
        offsets = self._offsets.setdefault(index, TextOffsets(self.tokenizer))
        return logprob_lists(delta.logprobs, self.tokenizer, offsets)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        chunk: dict[str, Any] = {
            "id": self.body_id,
            "object": "chat.completion.chunk" if self.kind == "chat" else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.include_usage:
            chunk["usage"] = None
        return _data(chunk | more)


def _data(body: dict[str, Any]) -> str:
    return f"data: {_encode(body)}\n\n"


def _usage_of_all(outputs: list[RequestOutput]) -> dict[str, Any]:
    each = [usage(output) for output in outputs]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in each)
    return {name: sum(one[name] for one in each) for name in names} | {
        "prompt_tokens_details": {"cached_tokens": cached}
    }
