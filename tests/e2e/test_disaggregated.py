"""launch/serve.py with a decode rank of its own: the openai client, clients that leave, and the
loss of that rank."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from launched import ROOT, launched
from served import url_when_ready
from transformers import AutoModelForCausalLM

LIMIT_S = 15.0
PROMPTS = (
    "x",
    "import os\nimport ",
    "for index, item in enumerate(items):\n    " * 30,
    "def f(a):",
)


def test_clients_are_served_until_the_decode_rank_is_lost(tmp_path: Path) -> None:
    flags = [
        "--decode-ranks",
        "1",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--num-gpu-blocks-override",
        "256",
    ]
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--port", "0", *flags]
    with launched(command, tmp_path / "log") as job:
        url = url_when_ready(job)

        with ThreadPoolExecutor(8) as pool:
            whole, streamed = (
                list(pool.map(lambda prompt, stream=stream: ask(url, prompt, stream), PROMPTS))
                for stream in (False, True)
            )
        assert whole == streamed
        assert whole[0] != whole[1]

        check_scores(url)
        sides = httpx.get(f"{url}/status").json()["kv_cache"]["sides"]
        assert [(side["name"], side["blocks_per_rank"]) for side in sides] == [
            ("prefill", 256),
            ("decode", 256),
        ]

        stream = iter(long_stream(url))
        next(stream)
        decoding = httpx.get(f"{url}/status").json()["kv_cache"]["sides"][1]
        assert decoding["used_per_rank"][0] > 0
        stream.close()
        deadline = time.monotonic() + 20
        while metric(url, "num_requests_running") or metric(url, "kv_cache_usage_perc"):
            assert time.monotonic() < deadline, "blocks of a client that left are still in use"
            time.sleep(0.05)

        stream = long_stream(url)
        next(iter(stream))
        ends: list[Exception | None] = []
        reader = threading.Thread(target=lambda: ends.append(end_of(stream)))
        reader.start()
        job.send(job.ranks()[1], signal.SIGKILL)
        reader.join(LIMIT_S)
        assert not reader.is_alive()
        assert job.wait_end(LIMIT_S) != 0
    assert "rank 1" in str(ends[0])


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, prompt: str, stream: bool) -> list[str]:
    """The texts of two samples."""
    answer = client(url).completions.create(
        model="sps2-tiny", prompt=prompt, max_tokens=12, temperature=0.8, seed=4, n=2, stream=stream
    )
    texts = ["", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


def long_stream(url: str) -> openai.Stream:
    return client(url).completions.create(
        model="sps2-tiny",
        prompt="y",
        max_tokens=3000,
        temperature=0,
        stream=True,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )


def end_of(stream: openai.Stream) -> Exception | None:
    try:
        for _ in stream:
            continue
    except (openai.APIError, httpx.HTTPError) as error:
        return error
    return None


def check_scores(url: str) -> None:
    """A harness that scores texts gets what transformers says of them."""
    ids = [
        httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"] for text in PROMPTS
    ]
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "model_configs" / "sps2-tiny", dtype=torch.float32
    )
    for max_tokens in (0, 1):
        answer = client(url).completions.create(
            model="sps2-tiny", prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1
        )
        for choice, prompt in zip(answer.choices, ids, strict=True):
            with torch.inference_mode():
                rows = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            own = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
            scored = choice.logprobs.token_logprobs
            assert len(scored) == len(prompt) + max_tokens and scored[0] is None
            assert scored[1 : len(prompt)] == pytest.approx(own, abs=1e-4)
            best = [max(top.values()) for top in choice.logprobs.top_logprobs[1 : len(prompt)]]
            assert best == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf"^sps2:{name}\{{.*\}} (\S+)$", text, re.M)[1])
