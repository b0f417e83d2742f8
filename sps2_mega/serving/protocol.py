"""Validation of OpenAI request bodies, and their conversion to a prompt and SamplingParams.

Batch files and the HTTP server share this. Besides the supported fields there are three kinds:

    harmless   (user, metadata, ...)          accepted silently
    unknown    (anything not listed here)     ignored, and reported as a warning
    meaningful (tools, logit_bias, ...)       refused by name: dropping them would change the answer

No tokenizer is needed: text stays text. `responses` forms response bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic

from sps2_mega.errors import RequestError
from sps2_mega.serving.request_fields import ChatFields, CompletionFields, SamplingFields
from sps2_mega.types import SamplingParams

Kind = Literal["completion", "chat"]

HARMLESS = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "stream_options",
    ]
)
# Fields for features that this runtime lacks, with the values that request nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logit_bias": ({},),
    "suffix": ("",),
    "echo": (False,),
    "stream": (False,),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "lora_request": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A validated request with either a `prompt` (text or token ids) or `messages`."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None
    params: SamplingParams
    model: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        return "completion" if self.messages is None else "chat"


def parse_request(
    body: Mapping[str, Any],
    *,
    kind: Kind | None = None,
    defaults: Mapping[str, Any] | None = None,
    echo: bool = False,
) -> ParsedRequest:
    """Validate and convert a request body.

    `kind=None` distinguishes completions from chat by `prompt` or `messages` and accepts either
    spelling of logprobs. `defaults` are SamplingParams fields that the body omits. Without either,
    a completion has at most 16 new tokens and a chat answer the rest of the context, as with
    OpenAI. With `echo`, log-probabilities cover the prompt as well, and `max_tokens` may be 0.

    Raises:
        RequestError: a field is wrong, missing or not supported; the message names it.
    """
    given = {name: value for name, value in body.items() if value is not None}
    if kind is None:
        kind = _kind_of(given)
        either_logprobs = True
    else:
        either_logprobs = False
    _refuse_unsupported(given, kind)
    try:
        fields = (ChatFields if kind == "chat" else CompletionFields).model_validate(given)
    except pydantic.ValidationError as error:
        raise RequestError(validation_text(error.errors(include_url=False))) from None
    params = _sampling_params(fields, kind, defaults or {}, either_logprobs)
    if echo:
        params = params.replace(prompt_logprobs=params.logprobs)
    elif params.max_tokens == 0:
        raise RequestError("max_tokens must be >= 1, got 0; 0 is allowed only with echo")
    return ParsedRequest(
        prompt=_one_prompt(fields.prompt) if isinstance(fields, CompletionFields) else None,
        messages=[message.flat() for message in fields.messages]
        if isinstance(fields, ChatFields)
        else None,
        params=params,
        model=fields.model,
        warnings=tuple(
            f"unknown field {name!r} ignored"
            for name in (fields.model_extra or {})
            if name not in HARMLESS and name not in UNSUPPORTED and name != "best_of"
        ),
    )


_SAME_NAME = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]


def _kind_of(given: Mapping[str, Any]) -> Kind:
    if ("prompt" in given) == ("messages" in given):
        both = "both" if "prompt" in given else "neither"
        raise RequestError(f"a request needs either prompt or messages; this one has {both}")
    return "chat" if "messages" in given else "completion"


def _refuse_unsupported(given: Mapping[str, Any], kind: Kind) -> None:
    for name, nothing in UNSUPPORTED.items():
        if name in given and given[name] not in nothing:
            raise RequestError(f"{name} is not supported (got {_short(given[name])})")
    if "best_of" in given and given["best_of"] != given.get("n", 1):
        raise RequestError(
            f"best_of is supported only when it equals n (best_of {_short(given['best_of'])}, "
            f"n {_short(given.get('n', 1))})"
        )
    if kind == "chat" and isinstance(given.get("messages"), list):
        for index, message in enumerate(given["messages"]):
            if isinstance(message, dict) and (
                message.get("role") == "tool" or message.get("tool_calls")
            ):
                raise RequestError(f"messages.{index}: tool calls are not supported")


def _sampling_params(
    fields: SamplingFields, kind: Kind, defaults: Mapping[str, Any], either_logprobs: bool
) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": None} if kind == "chat" else {}
    values.update(defaults)
    values.update(
        {name: getattr(fields, name) for name in _SAME_NAME if getattr(fields, name) is not None}
    )
    if fields.max_completion_tokens is not None:
        values["max_tokens"] = fields.max_completion_tokens
    if fields.stop is not None:
        values["stop"] = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    if fields.stop_token_ids is not None:
        values["stop_token_ids"] = tuple(fields.stop_token_ids)
    if values.get("top_k") == -1:  # as vLLM and SGLang switch it off
        values["top_k"] = 0
    if fields.logprobs is not None or fields.top_logprobs is not None:
        values["logprobs"] = _logprobs(fields, kind, either_logprobs)
    return SamplingParams(**values)


def _logprobs(fields: SamplingFields, kind: Kind, either: bool) -> int | None:
    """Number of logprobs: chat has `logprobs: true, top_logprobs: k`; completions `logprobs: k`."""
    value = fields.logprobs
    if (
        kind == "completion"
        and not either
        and (isinstance(value, bool) or fields.top_logprobs is not None)
    ):
        raise RequestError(
            "logprobs of a completion is a number; true and top_logprobs are for chat"
        )
    if kind == "chat" and not either and value is not None and not isinstance(value, bool):
        raise RequestError(
            f"logprobs of a chat is true or false (with top_logprobs), got {value!r}"
        )
    if value is None or value is False:
        if fields.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        return None
    if value is True:
        return fields.top_logprobs or 0
    return value if fields.top_logprobs is None else max(value, fields.top_logprobs)


def _one_prompt(prompt: str | list[int] | list[str] | list[list[int]]) -> str | list[int]:
    if isinstance(prompt, str) or not prompt:
        return prompt  # type: ignore[return-value]
    if isinstance(prompt[0], int):
        return prompt  # type: ignore[return-value]
    if len(prompt) > 1:
        raise RequestError(
            f"prompt holds {len(prompt)} prompts; one request takes one, so write one request "
            "for each"
        )
    return prompt[0]


def validation_text(errors: Sequence[Mapping[str, Any]], limit: int = 3) -> str:
    """Message about the first `limit` wrong fields, from pydantic's errors; long values are cut."""
    seen: dict[str, str] = {}
    for item in errors:
        # A location begins with field and index; the rest names members of a union.
        place = [
            str(part) for part in item["loc"] if part == item["loc"][0] or isinstance(part, int)
        ]
        name = ".".join(place)
        if item["type"] == "missing":
            text = f"{name}: {item['loc'][-1]} is missing"
        else:
            text = f"{name}: {item['msg']} (got {_short(item['input'])})"
        seen.setdefault(name, text)
    texts = list(seen.values())
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
