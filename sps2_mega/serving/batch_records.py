"""Records of the output file: our own for simple lines, OpenAI's for OpenAI lines.

Error records carry the input's line number besides the id, because a
duplicate shares its id with another line.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from sps2_mega.logprobs import TokenLogprob
from sps2_mega.outputs import Completion, RequestOutput
from sps2_mega.serving.batch_input import BadLine, GoodLine
from sps2_mega.serving.responses import (
    chat_body,
    completion_body,
    timings_record,
    token_text,
    usage,
)
from sps2_mega.text.tokenizer import Tokenizer


def answer_record(
    line: GoodLine, output: RequestOutput, *, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Record of a finished request."""
    if line.openai:
        return _openai_answer(line, output, model=model, tokenizer=tokenizer)
    record: dict[str, Any] = {"id": line.line_id}
    if len(output.completions) == 1:
        record |= _simple_choice(output.completions[0], tokenizer)
        timings = record.pop("timings")
        logprobs = record.pop("logprobs", None)
        record |= {"usage": usage(output), "timings": timings}
        return record if logprobs is None else record | {"logprobs": logprobs}
    choices = [
        {"index": completion.index} | _simple_choice(completion, tokenizer)
        for completion in output.completions
    ]
    return record | {"choices": choices, "usage": usage(output)}


def error_record(line: GoodLine | BadLine, message: str) -> dict[str, Any]:
    """Record of a line without an answer."""
    if not line.openai:
        error = {"type": "invalid_request_error", "message": message, "line": line.number}
        return {"id": line.line_id, "error": error}
    envelope = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {
        "id": _unique("batch_req"),
        "custom_id": line.line_id,
        "response": {
            "status_code": 400,
            "request_id": _unique("req"),
            "body": {"error": envelope},
        },
        "error": {"code": "invalid_request_error", "message": message, "line": line.number},
    }


def _openai_answer(
    line: GoodLine, output: RequestOutput, *, model: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    chat = line.request.kind == "chat"
    body = (chat_body if chat else completion_body)(
        output,
        body_id=_unique("chatcmpl" if chat else "cmpl"),
        model=model,
        created=int(time.time()),
        tokenizer=tokenizer,
    )
    timings = [timings_record(completion.timings) for completion in output.completions]
    return {
        "id": _unique("batch_req"),
        "custom_id": line.line_id,
        "response": {"status_code": 200, "request_id": _unique("req"), "body": body},
        "error": None,
        "timings": timings[0] if len(timings) == 1 else timings,
    }


def _simple_choice(completion: Completion, tokenizer: Tokenizer | None) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason.value,
        "timings": timings_record(completion.timings),
    }
    if completion.logprobs is not None:
        choice["logprobs"] = [_logprob(item, tokenizer) for item in completion.logprobs]
    return choice


def _logprob(item: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(token_id, tokenizer)
        return {"token_id": token_id, "token": text, "logprob": max(logprob, -9999.0)}

    return entry(item.token_id, item.logprob) | {"top": [entry(*top) for top in item.top]}


def _unique(prefix: str) -> str:
    return (
        f"{prefix}-{uuid.uuid4().hex}"
        if prefix.endswith("cmpl")
        else f"{prefix}_{uuid.uuid4().hex}"
    )
