"""The end of a served job: after a rank that hangs, and at the second signal. Nothing stays."""

from __future__ import annotations

import re
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from launched import launch_command, launched
from served import serve_command, url_when_ready

STEP_TIMEOUT_S = 3
LIMIT_S = 15.0 + STEP_TIMEOUT_S
NUM_CLIENTS = 3


def ask(url: str, prompt: list[int], *, stream: bool) -> tuple[int, str]:
    """Status and whole body; 0 where the connection was lost."""
    body = {"prompt": prompt, "max_tokens": 3000, "ignore_eos": True, "stream": stream}
    if len(prompt) > 1000:
        body["max_tokens"] = 8
    try:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    except httpx.HTTPError as error:
        return 0, str(error)
    return answer.status_code, answer.text


def status(url: str) -> dict:
    return httpx.get(f"{url}/status", timeout=30).json()


def health_until_the_end(url: str) -> set[int]:
    """All statuses of /health until nobody answers any more."""
    seen = set()
    while True:
        try:
            seen.add(httpx.get(f"{url}/health", timeout=LIMIT_S).status_code)
        except httpx.HTTPError:
            return seen
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "phase"), [("python", "idle"), ("torchrun", "decode"), ("python", "prefill")]
)
def test_every_connection_ends_with_the_reason(tmp_path, launcher, phase):
    start = [sys.executable] if launcher == "python" else launch_command(launcher, 2)
    command = [*start, *serve_command("--override", f"step_timeout={STEP_TIMEOUT_S}")]
    with launched(command, tmp_path / "log") as job, ThreadPoolExecutor(NUM_CLIENTS + 1) as pool:
        url = url_when_ready(job)

        def ask_all(length: int) -> list[Future]:
            # Prompts differ in their first token, so that none finds another's prefix.
            prompts = [
                [5 + i] + [9 + n % 200 for n in range(length - 1)] for i in range(NUM_CLIENTS)
            ]
            return [
                pool.submit(ask, url, prompt, stream=index % 2 == 1)
                for index, prompt in enumerate(prompts)
            ]

        answers = []
        if phase == "decode":
            answers = ask_all(5)
            job.wait_until(lambda: status(url)["load"]["output_tokens"] > 20, 30)
        elif phase == "prefill":
            answers = ask_all(3900)
            job.wait_until(lambda: status(url)["open_requests"] > 0, 30)
        job.send(job.ranks()[1], signal.SIGSTOP)
        health = pool.submit(health_until_the_end, url)
        if phase == "idle":
            time.sleep(0.1)
            answers = ask_all(5)
        ends = [answer.result(LIMIT_S) for answer in answers]
        assert job.wait_end(LIMIT_S) != 0
        assert health.result(1) == {200, 503}
        [message] = job.messages()
    assert re.search(r"rank 1 \(node .*\) stopped answering in step \d+ ", message), message
    for index, (code, text) in enumerate(ends):
        assert code == (200 if index % 2 else 503), ends
        assert "stopped answering" in text and "service_unavailable" in text


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_running_requests(tmp_path):
    command = [sys.executable, *serve_command("--drain-timeout", "60")]
    with launched(command, tmp_path / "log") as job, ThreadPoolExecutor(1) as pool:
        url = url_when_ready(job)
        answer = pool.submit(ask, url, [5, 6], stream=True)
        job.wait_until(lambda: status(url)["load"]["output_tokens"] > 20, 30)
        job.send(job.main.pid, signal.SIGTERM)
        job.wait_until(lambda: status(url)["state"] == "draining", 10)
        assert httpx.get(f"{url}/health").status_code == 200
        time.sleep(1.2)  # an echo of the first one comes earlier
        assert not answer.done(), "it ended by itself, too early to prove anything"
        job.send(job.main.pid, signal.SIGTERM)
        assert job.wait_end(10) == 128 + signal.SIGTERM
        code, text = answer.result(10)
    assert code == 200 and "SIGTERM" in text and text.endswith("data: [DONE]\n\n")
