"""`/v1/completions` and `/v1/chat/completions`: body to call, call to answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sps2_mega.errors import RequestError
from sps2_mega.outputs import RequestOutput
from sps2_mega.serving.echo import Echo, check_size, echo_of
from sps2_mega.serving.http.answers import Answer
from sps2_mega.serving.http.api_errors import ApiError
from sps2_mega.serving.http.bodies import ChatBody, CompletionBody
from sps2_mega.serving.http.calls import Call
from sps2_mega.serving.http.documented import GENERATION_RESPONSES
from sps2_mega.serving.http.gate import request_id_of
from sps2_mega.serving.http.state import ServerState, server_state
from sps2_mega.serving.prompts import prompt_tokens
from sps2_mega.serving.protocol import Kind, ParsedRequest, parse_request
from sps2_mega.types import SamplingParams

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1", tags=["generation"], responses=GENERATION_RESPONSES)

# Longer texts are tokenised in another thread, so that streams continue meanwhile.
_LONG_TEXT = 20_000
_LEFT = 499  # as nginx logs a client that closed the connection; nobody receives it


@router.post("/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue a prompt, or each of several: text, token ids, or a list of either."""
    state = server_state(request)
    prompts = _prompts_of(body)
    fields = await _fields(request) | {"prompt": prompts[0]}
    parsed = _parsed(fields, "completion", state, echo=bool(body.echo))
    each = [parsed] + [_with_prompt(parsed, prompt) for prompt in prompts[1:]]
    return await _generate(request, state, each, stream=body, echo=bool(body.echo))


@router.post("/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Generate the next message of a conversation."""
    state = server_state(request)
    parsed = _parsed(await _fields(request), "chat", state)
    return await _generate(request, state, [parsed], stream=body, echo=False)


async def _fields(request: Request) -> dict[str, Any]:
    """The body as received, without the fields that only the server reads."""
    fields: dict[str, Any] = await request.json()
    return {name: value for name, value in fields.items() if name not in ("stream", "echo")}


def _parsed(
    fields: dict[str, Any], kind: Kind, state: ServerState, *, echo: bool = False
) -> ParsedRequest:
    state.async_engine.model  # noqa: B018  503 precedes every other error
    try:
        parsed = parse_request(fields, kind=kind, echo=echo)
    except RequestError as error:
        raise ApiError(400, str(error)) from None
    if parsed.model is not None and parsed.model not in state.model_names:
        raise ApiError(
            404,
            f"the model {parsed.model[:200]!r} is not served here, but {state.model_names[0]!r} is",
            code="model_not_found",
            param="model",
        )
    for warning in parsed.warnings:
        state.warn_once(warning)
    return parsed


def _prompts_of(body: CompletionBody) -> list[Any]:
    """Each prompt by itself; a list of token ids is one prompt."""
    prompt = body.prompt
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _with_prompt(parsed: ParsedRequest, prompt: str | list[int]) -> ParsedRequest:
    return ParsedRequest(prompt=prompt, params=parsed.params, model=parsed.model)


def _echoes(
    each: list[ParsedRequest], tokens: list[list[int]], params: SamplingParams, state: ServerState
) -> list[Echo]:
    tokenizer = state.async_engine.model.tokenizer
    try:
        if params.prompt_logprobs is not None:
            check_size(tokens, num_samples=params.n, num_top=params.prompt_logprobs)
        return [
            echo_of(parsed.prompt or "", ids, tokenizer)
            for parsed, ids in zip(each, tokens, strict=True)
        ]
    except RequestError as error:
        raise ApiError(400, str(error), param="echo") from None


async def _generate(
    request: Request,
    state: ServerState,
    each: list[ParsedRequest],
    *,
    stream: CompletionBody | ChatBody,
    echo: bool,
) -> Response:
    kind, params = each[0].kind, each[0].params
    tokens = [await _tokens(parsed, state) for parsed in each]
    echoes = _echoes(each, tokens, params, state) if echo else None
    call = state.async_engine.open(tokens, params, stream=bool(stream.stream))
    answer = Answer(
        kind=kind,
        body_id=f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{call.call_id}",
        model=state.model_names[0],
        created=int(time.time()),
        num_samples=params.n,
        tokenizer=state.async_engine.model.tokenizer,
        request_id=request_id_of(request.scope),
        echoes=echoes,
        has_prompt_logprobs=params.prompt_logprobs is not None,
        include_usage=bool(stream.stream_options and stream.stream_options.include_usage),
    )
    if stream.stream:
        return EventStream(call, answer, keep_alive=state.config.stream_keep_alive)
    with call:
        outputs = await _unless_left(request, call)
        if outputs is None:
            return Response(status_code=_LEFT)
        return await _made(answer, outputs)


async def _tokens(parsed: ParsedRequest, state: ServerState) -> list[int]:
    tokenizer = state.async_engine.model.tokenizer
    size = len(parsed.prompt or ()) + sum(len(m["content"]) for m in parsed.messages or ())
    try:
        if size <= _LONG_TEXT:
            return prompt_tokens(parsed, tokenizer)
        return await asyncio.to_thread(prompt_tokens, parsed, tokenizer)
    except RequestError as error:
        raise ApiError(400, str(error)) from None


async def _made(answer: Answer, outputs: list[RequestOutput]) -> Response:
    if not answer.is_large(outputs):
        return JSONResponse(answer.whole(outputs))
    return await asyncio.to_thread(lambda: JSONResponse(answer.whole(outputs)))


async def _unless_left(request: Request, call: Call) -> Any:
    """The call's outputs; None if the client closed the connection before."""
    answered = asyncio.ensure_future(call.finish())
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([answered, left], return_when=asyncio.FIRST_COMPLETED)
        return answered.result() if answered.done() else None
    finally:
        for task in (answered, left):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


class EventStream(StreamingResponse):
    """Response of server-sent events; headers are sent at once, and the call is always closed."""

    def __init__(self, call: Call, answer: Answer, *, keep_alive: float) -> None:
        super().__init__(
            answer.events(call, keep_alive=keep_alive),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._call:
            await super().__call__(scope, receive, send)
