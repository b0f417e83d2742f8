"""OpenAI response bodies of finished requests: text_completion, chat.completion, usage, logprobs.

This module decides the shapes only; `protocol` decides what a request may contain.
"""

from __future__ import annotations

import codecs
import math
from typing import Any

from sps2_mega.logprobs import TokenLogprob
from sps2_mega.outputs import Completion, RequestOutput, Timings
from sps2_mega.text.tokenizer import Tokenizer

# JSON has no infinity; impossible tokens get this instead.
_LOWEST_LOGPROB = -9999.0


def completion_body(
    output: RequestOutput, *, body_id: str, model: str, created: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A `text_completion` object; `created` is in Unix seconds."""
    return {
        "id": body_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": completion.index,
                "text": completion.text,
                "finish_reason": completion.finish_reason.value,
                "logprobs": completion_logprobs(completion, tokenizer),
            }
            for completion in output.completions
        ],
        "usage": usage(output),
    }


def chat_body(
    output: RequestOutput, *, body_id: str, model: str, created: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A `chat.completion` object; `created` is in Unix seconds."""
    return {
        "id": body_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "finish_reason": completion.finish_reason.value,
                "logprobs": chat_logprobs(completion, tokenizer),
            }
            for completion in output.completions
        ],
        "usage": usage(output),
    }


def usage(output: RequestOutput) -> dict[str, Any]:
    """Token counts; the prompt counts once, however many samples it has.

    `cached_tokens` of the prompt were in the KV cache when the first sample began.
    """
    prompt = len(output.prompt_token_ids)
    new = sum(len(completion.token_ids) for completion in output.completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
    }


def timings_record(timings: Timings) -> dict[str, float | None]:
    """Timings in seconds, rounded to microseconds."""
    return {
        "queue_s": round(timings.queue_s, 6),
        "ttft_s": round(timings.ttft_s, 6),
        "per_token_s": None if timings.per_token_s is None else round(timings.per_token_s, 6),
        "total_s": round(timings.total_s, 6),
    }


def completion_logprobs(
    completion: Completion, tokenizer: Tokenizer | None
) -> dict[str, Any] | None:
    """Logprobs as parallel lists over tokens.

    `text_offset` counts characters from the start of the output.
    """
    if completion.logprobs is None:
        return None
    return logprob_lists(completion.logprobs, tokenizer, TextOffsets(tokenizer))


def logprob_lists(
    logprobs: list[TokenLogprob], tokenizer: Tokenizer | None, offsets: TextOffsets
) -> dict[str, Any]:
    """Parallel lists for a range of tokens of an output, whose starts `offsets` tracks."""
    return {
        "tokens": [token_text(item.token_id, tokenizer) for item in logprobs],
        "token_logprobs": [_finite(item.logprob) for item in logprobs],
        "top_logprobs": [
            {token_text(token_id, tokenizer): _finite(logprob) for token_id, logprob in item.top}
            for item in logprobs
        ],
        "text_offset": [offsets.of_next(item.token_id) for item in logprobs],
    }


def chat_logprobs(completion: Completion, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    """One logprob entry per token, with its bytes, so that split characters can be joined."""
    if completion.logprobs is None:
        return None
    return logprob_entries(completion.logprobs, tokenizer)


def logprob_entries(logprobs: list[TokenLogprob], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Logprob entries for a range of tokens of an output."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id) if tokenizer else b""
        return {
            "token": token_text(token_id, tokenizer),
            "logprob": _finite(logprob),
            "bytes": list(raw) if tokenizer else None,
        }

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(*top) for top in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def token_text(token_id: int, tokenizer: Tokenizer | None) -> str:
    r"""Text of a single token.

    Part of a character reads `bytes:\\xe4`; without a tokenizer the text is `token_id:7`.
    """
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Start of each token's text, in characters; the output's first token is at `start`."""

    def __init__(self, tokenizer: Tokenizer | None, *, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._position = start

    def of_next(self, token_id: int) -> int:
        """Offset of the next token of the output, which is `token_id`."""
        begin = self._position
        if self._tokenizer is not None and token_id not in self._tokenizer.special_ids:
            self._position += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return begin


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST_LOGPROB
