"""`/tokenize` and `/detokenize`: the model's tokenizer for clients that count or build prompts."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from sps2_mega.errors import RequestError
from sps2_mega.serving.http.api_errors import ApiError
from sps2_mega.serving.http.bodies import DetokenizeBody, TokenizeBody
from sps2_mega.serving.http.documented import TOKEN_RESPONSES
from sps2_mega.serving.http.state import server_state
from sps2_mega.serving.prompts import message_tokens, text_tokens
from sps2_mega.text.tokenizer import Tokenizer

router = APIRouter(tags=["tokens"], responses=TOKEN_RESPONSES)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> dict[str, Any]:
    """Token ids of a text or of messages.

    A text gets the special tokens of a prompt unless `add_special_tokens` is false.
    """
    model = server_state(request).async_engine.model
    try:
        tokens = await asyncio.to_thread(_tokens, body, model.tokenizer)
    except RequestError as error:
        raise ApiError(400, str(error)) from None
    return {"tokens": tokens, "count": len(tokens), "max_model_len": model.max_len}


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, Any]:
    """Text of token ids, special tokens included; unknown ids give no text."""
    tokenizer = server_state(request).async_engine.model.tokenizer
    if tokenizer is None:
        raise ApiError(400, "the model was loaded without a tokenizer")
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}


def _tokens(body: TokenizeBody, tokenizer: Tokenizer | None) -> list[int]:
    if body.messages is not None:
        return message_tokens([message.flat() for message in body.messages], tokenizer)
    return text_tokens(body.prompt or "", tokenizer, add_special_tokens=body.add_special_tokens)
