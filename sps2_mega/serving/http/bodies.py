"""Request bodies of the server, as its OpenAPI schema shows them.

`request_fields` has the fields shared with batch files; `protocol` interprets them.
"""

from __future__ import annotations

from typing import Annotated

import pydantic

from sps2_mega.serving.request_fields import ChatFields, ChatMessage, CompletionFields

TokenId = Annotated[int, pydantic.Field(ge=0, lt=2**31)]


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class CompletionBody(CompletionFields):
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None


class ChatBody(ChatFields):
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TokenizeBody(pydantic.BaseModel):
    """Either `prompt` or `messages`; messages always go through the chat template."""

    model_config = pydantic.ConfigDict(strict=True)

    prompt: str | None = None
    messages: list[ChatMessage] | None = pydantic.Field(default=None, min_length=1)
    add_special_tokens: bool = True

    @pydantic.model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is needed")
        return self


class DetokenizeBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    tokens: list[TokenId]
