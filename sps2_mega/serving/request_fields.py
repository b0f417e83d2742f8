"""Names and types of the fields of OpenAI request bodies, with the usual extensions.

Types only: SamplingParams checks ranges, and `protocol` checks combinations.
"""

from __future__ import annotations

from typing import Literal

import pydantic


class SamplingFields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None


class CompletionFields(SamplingFields):
    prompt: str | list[int] | list[str] | list[list[int]]


class TextPart(pydantic.BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(pydantic.BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def flat(self) -> dict[str, str]:
        # `developer` is OpenAI's newer name for `system`; templates know the older one.
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatFields(SamplingFields):
    messages: list[ChatMessage] = pydantic.Field(min_length=1)
