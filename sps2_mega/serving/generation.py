"""Calls of `LLM` on the rank that drives: prompts to tokens, tokens to finished outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sps2_mega.config import EngineConfig
from sps2_mega.errors import RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.serving.drive import Submission, drive
from sps2_mega.serving.protocol import parse_request
from sps2_mega.types import SamplingParams

if TYPE_CHECKING:
    from sps2_mega.engine.start import Driver

Prompt = str | list[int]
Message = dict[str, Any]


class Generation:
    """An engine that answers one call after the other; prompts and params are of equal number."""

    def __init__(self, engine: Driver, config: EngineConfig) -> None:
        self._engine, self._config = engine, config

    def generate(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """One output per prompt, in order.

        Raises:
            RequestError: text was given without a tokenizer.
        """
        return self._run([self._tokens(prompt) for prompt in prompts], params)

    def chat(
        self, conversations: Sequence[Sequence[Message]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """The next assistant message of each conversation.

        Raises:
            RequestError: messages are malformed, or the chat template refuses them.
        """
        tokenizer = self._tokenizer()
        tokens = [
            tokenizer.apply_chat_template(
                parse_request({"messages": list(messages)}, kind="chat").messages
            )
            for messages in conversations
        ]
        return self._run(tokens, params)

    def close(self) -> None:
        """End the job on all ranks; safe to call twice."""
        self._engine.shutdown()

    def _run(
        self, prompts: list[list[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        def source() -> Iterator[Submission | RequestOutput]:
            for index, (tokens, one) in enumerate(zip(prompts, params, strict=True)):
                yield Submission(request_id=str(index), prompt_token_ids=tokens, params=one)

        finished = {
            int(output.request_id): output
            for output in drive(
                self._engine, source(), max_in_flight=4 * self._config.scheduler.max_running
            )
        }
        return [finished[index] for index in range(len(prompts))]

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self._tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _tokenizer(self) -> Any:
        if self._engine.tokenizer is None:
            raise RequestError(
                f"{self._config.model} has no tokenizer: give token ids, or a folder as tokenizer="
            )
        return self._engine.tokenizer
