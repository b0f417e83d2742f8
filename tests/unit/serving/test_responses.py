from __future__ import annotations

import json
import math

from sps2_mega.logprobs import TokenLogprob
from sps2_mega.outputs import Completion, RequestOutput, Timings
from sps2_mega.serving.responses import chat_body, completion_body, timings_record, token_text
from sps2_mega.text.tokenizer import Tokenizer
from sps2_mega.types import FinishReason


def finished(tokenizer: Tokenizer, texts: list[str], *, logprobs: bool) -> RequestOutput:
    completions = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        tops = [TokenLogprob(i, -0.25, ((i, -0.25), (ids[0], -math.inf))) for i in ids]
        completions.append(
            Completion(
                index=index,
                text=text,
                token_ids=ids,
                finish_reason=FinishReason.LENGTH,
                logprobs=tops if logprobs else None,
                timings=Timings(queue_s=0.1, ttft_s=0.2, per_token_s=None, total_s=0.2),
            )
        )
    return RequestOutput(
        request_id="r", prompt_token_ids=[1, 2, 3], completions=completions, num_cached_tokens=2
    )


def build(body, output, tokenizer):
    made = body(output, body_id="id-1", model="m", created=17, tokenizer=tokenizer)
    return json.loads(json.dumps(made, allow_nan=False))


def test_completion_shape(tokenizer) -> None:
    body = build(completion_body, finished(tokenizer, ["ab", "c"], logprobs=False), tokenizer)
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert (body["id"], body["object"], body["created"], body["model"]) == (
        "id-1",
        "text_completion",
        17,
        "m",
    )
    assert body["choices"][1] == {
        "index": 1,
        "text": "c",
        "finish_reason": "length",
        "logprobs": None,
    }


def test_chat_shape(tokenizer) -> None:
    body = build(chat_body, finished(tokenizer, ["ab"], logprobs=False), tokenizer)
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    assert choice["logprobs"] is None


def test_completion_logprobs_are_parallel_lists(tokenizer) -> None:
    body = build(completion_body, finished(tokenizer, ["aé!"], logprobs=True), tokenizer)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["token_logprobs"] == [-0.25] * 4
    assert logprobs["top_logprobs"][3] == {"!": -0.25, "a": -9999.0}


def test_chat_logprobs_have_bytes(tokenizer) -> None:
    body = build(chat_body, finished(tokenizer, ["é"], logprobs=True), tokenizer)
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(content[0]["bytes"] + content[1]["bytes"]).decode() == "é"
    assert content[1]["top_logprobs"][1]["logprob"] == -9999.0


def test_without_tokenizer_tokens_are_numbers(tokenizer) -> None:
    assert token_text(7, None) == "token_id:7"
    body = build(chat_body, finished(tokenizer, ["a"], logprobs=True), None)
    assert body["choices"][0]["logprobs"]["content"][0]["bytes"] is None


def test_timings_are_rounded_and_keep_none() -> None:
    record = timings_record(Timings(queue_s=0.12345678, ttft_s=1, per_token_s=None, total_s=2))
    assert record == {"queue_s": 0.123457, "ttft_s": 1, "per_token_s": None, "total_s": 2}
