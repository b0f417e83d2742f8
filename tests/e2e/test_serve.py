"""launch/serve.py as users start it: real model, real ranks, openai client, signals, lost ranks."""

from __future__ import annotations

import asyncio
import json
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
from generation_job import generate_command, texts_of, write_requests
from launched import launch_command, launched
from served import serve_command, url_when_ready

from benchmarks.soak import with_ids
from benchmarks.soaking.cases import Answer, CaseMix
from benchmarks.soaking.client import soak
from benchmarks.soaking.state import state_faults

NUM_CLIENTS = 32
LIMIT_S = 15.0


def client(url: str, **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, **options)


def ask(url: str, line: dict, *, stream: bool) -> str:
    answer = client(url).completions.create(
        model="sps2-tiny",
        prompt=line["prompt"],
        max_tokens=line["max_tokens"],
        temperature=0,
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    chunks = answer if stream else [answer]
    return "".join(chunk.choices[0].text for chunk in chunks)


def requests_and_offline_texts(folder: Path) -> tuple[list[dict], dict]:
    requests, answers = folder / "in.jsonl", folder / "out.jsonl"
    write_requests(requests, NUM_CLIENTS, 14)
    alone = generate_command(requests, answers, sp=1, extra=["--max-num-seqs", "32"])
    with launched([sys.executable, *alone], folder / "log-offline") as job:
        assert job.main.wait(180) == 0, job.output()
    return [json.loads(line) for line in requests.read_text().splitlines()], texts_of(answers)


@pytest.mark.slow
def test_clients_get_what_generate_writes_and_sigterm_drains(tmp_path):
    """Plain python, which starts its second rank itself."""
    lines, offline = requests_and_offline_texts(tmp_path)
    with launched([sys.executable, *serve_command(num_blocks=512)], tmp_path / "log") as job:
        url = url_when_ready(job)
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            texts = list(
                pool.map(lambda i: ask(url, lines[i], stream=i % 2 == 1), range(NUM_CLIENTS))
            )
        assert dict(zip([line["id"] for line in lines], texts, strict=True)) == offline

        check_seeds_and_samples(url)
        leave_a_stream(url)
        soak_a_little(url, lines, offline)

        first = iter(long_stream(url, 150))
        next(first)
        job.send(job.main.pid, signal.SIGTERM)
        while httpx.get(f"{url}/ready").status_code == 200:
            time.sleep(0.02)
        with pytest.raises(openai.APIError):  # 503, or the port is closed already
            ask(url, lines[0], stream=False)
        assert len(list(first)) == 149, "a running request must be finished"
        assert job.wait_end(30) == 0, job.output()
    assert job.messages() == []
    assert "sps2_mega has stopped" in job.output()


def check_seeds_and_samples(url: str) -> None:
    asked = dict(model="sps2-tiny", prompt="def f(", max_tokens=8, temperature=1.0, n=3, logprobs=2)
    first, again, other = (client(url).completions.create(**asked, seed=seed) for seed in (7, 7, 8))
    texts = [[choice.text for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    logprobs = first.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)


def leave_a_stream(url: str) -> None:
    """The blocks of a client that leaves are free soon after."""
    stream = long_stream(url, 3000)
    next(iter(stream))
    assert metric(url, "num_requests_running") == 1
    stream.close()
    deadline = time.monotonic() + 10
    while metric(url, "num_requests_running") or metric(url, "kv_cache_usage_perc"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def soak_a_little(url: str, lines: list[dict], offline: dict) -> None:
    """Mixed shapes, clients that leave, invalid requests; benchmarks/soak.py sends thousands."""
    answers = [
        Answer(
            fields={name: value for name, value in line.items() if name != "id"},
            text=offline[line["id"]],
            num_tokens=line["max_tokens"],
        )
        for line in lines
    ]
    known = [with_ids(answer, url) for answer in answers]
    mix = CaseMix(answers=known, model="sps2-tiny", max_model_len=4096)
    result = asyncio.run(soak(url, mix.draw(60), at_once=12))
    assert result.faults == []
    assert (result.done, result.endings["left"], result.endings["refused"]) == (60, 12, 6)
    assert list(state_faults(url)) == []


def long_stream(url: str, max_tokens: int) -> openai.Stream:
    return client(url).completions.create(
        model="sps2-tiny",
        prompt="x",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        logprobs=0,  # one event per token, also where a token has no text
        extra_body={"ignore_eos": True},
    )


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(rf"^sps2:{name}\{{.*\}} (\S+)$", text, re.M)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "victim"), [("torchrun", 1), ("deepspeed", 0)])
def test_a_killed_rank_ends_every_connection(tmp_path, launcher, victim):
    command = [*launch_command(launcher, 2), *serve_command(num_blocks=512)]
    with launched(command, tmp_path / "log") as job:
        url = url_when_ready(job)
        stream = long_stream(url, 3000)
        ends: list[Exception | None] = []

        def consume() -> None:
            try:
                for _ in stream:
                    continue
                ends.append(None)
            except (openai.APIError, httpx.HTTPError) as error:
                ends.append(error)

        def wait() -> None:
            try:
                client(url).completions.create(
                    model="sps2-tiny",
                    prompt="y",
                    max_tokens=3000,
                    extra_body={"ignore_eos": True},
                )
                ends.append(None)
            except openai.APIError as error:
                ends.append(error)

        threads = [threading.Thread(target=target) for target in (consume, wait)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while metric(url, "num_requests_running") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)

        job.send(job.ranks()[victim], signal.SIGKILL)
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert job.wait_end(LIMIT_S) != 0
        [message] = job.messages()
    assert f"rank {victim} (node " in message
    assert None not in ends and len(ends) == 2
    if victim != 0:  # rank 0 lived long enough to say why
        assert all("rank 1" in str(error) for error in ends), ends


def test_a_taken_port_is_said_before_anything_loads(tmp_path):
    command = [sys.executable, *serve_command("--host", "192.0.2.1")]
    with launched(command, tmp_path / "log") as job:
        assert job.main.wait(60) == 2
        [message] = job.messages()
    assert "cannot listen on 192.0.2.1 port 0" in message
