"""launch/generate.py as a user starts it: real model, real ranks, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sps2_mega.bundled import bundled_prompts
from sps2_mega.checkpoint.export import export_megatron
from sps2_mega.checkpoint.source import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "generate.py")
SMALL_CACHE = ["--num-gpu-blocks-override", "400"]
COMMANDS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus=2", SCRIPT],
    "sps2": ["-m", "sps2_mega.cli", "generate"],  # starts the second rank itself
}


def environment() -> dict[str, str]:
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in ranks}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        # The deepspeed launcher calls `python` from the path.
        "PATH": f"{Path(sys.executable).parent}:{inherited['PATH']}",
    }


def generate(
    folder: Path, *argv: str, command: Sequence[str] = (SCRIPT,)
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command, *SMALL_CACHE, *argv],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def records(path: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {str(line.get("custom_id", line.get("id"))): line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    result = generate(folder, "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_bundled_prompts_with_nothing_but_defaults(one_rank: Path) -> None:
    answers = records(one_rank / "out.jsonl")
    asked = [json.loads(line) for line in bundled_prompts().read_text().splitlines()]
    assert answers.keys() == {line["id"] for line in asked}
    for line in asked:
        answer = answers[line["id"]]
        choices = answer.get("choices", [answer])
        assert len(choices) == line.get("n", 1)
        assert all(len(choice["token_ids"]) <= line["max_tokens"] for choice in choices)
        assert answer["usage"]["prompt_tokens"] == len(line["prompt"].encode()) + 1
    # The long prompt asks for a number that stands some 2,000 bytes before.
    assert answers["far-definition"]["text"] == "34280"
    stdout = (one_rank / "stdout").read_text()
    assert "[far-definition] 34280" in stdout
    assert "requests ok     | 12" in stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_two_sp_ranks_answer_the_same(one_rank: Path, tmp_path: Path, command: str) -> None:
    """`sps2` from a Megatron folder that states no architecture, which --config gives."""
    given = model_without_arguments(tmp_path / "megatron") if command == "sps2" else []
    flags = ["--sp", "2", "--dtype", "float32", *given]
    result = generate(tmp_path, *flags, command=COMMANDS[command])
    assert result.returncode == 0, result.stderr
    answers, expected = records(tmp_path / "out.jsonl"), records(one_rank / "out.jsonl")
    assert answers.keys() == expected.keys()
    for name, answer in answers.items():
        assert texts(answer) == texts(expected[name]), name
    assert result.stdout.count("requests ok") == 1
    assert ("no launcher: starting all 2 ranks" in result.stderr) == (command == "sps2")


def model_without_arguments(folder: Path) -> list[str]:
    """The bundled model as a torch_dist folder without arguments, and the flags to run it."""
    export_megatron(open_checkpoint(ROOT / "model_configs" / "sps2-tiny"), folder)
    (folder / "release" / "common.pt").unlink()
    return ["--model", str(folder), "--config", "sps2-tiny", "--input", str(bundled_prompts())]


def texts(answer: dict) -> list[str]:
    return [choice["text"] for choice in answer.get("choices", [answer])]


FLAGS = ["--input", "in.jsonl", "--dtype", "float32", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of mixed lines, some with mistakes, and 40 plain ones, and their answers."""
    lines = [
        {
            "id": "tokens",
            "prompt": list(b"import "),
            "max_tokens": 4,
            "temperature": 0,
            "logprobs": 2,
        },
        {"id": "long", "prompt": "x" * 5000},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
        {
            "custom_id": "chat",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [{"role": "user", "content": "hi"}],
                "max_tokens": 5,
                "logprobs": True,
                "top_logprobs": 1,
            },
        },
    ]
    lines += [
        {"id": f"r{i}", "prompt": f"def f{i}(", "max_tokens": 1 + 13 * (i % 9)} for i in range(40)
    ]
    folder = tmp_path_factory.mktemp("mixed")
    source = folder / "in.jsonl"
    source.write_text("{bad\n" + "".join(json.dumps(line) + "\n" for line in lines))
    result = generate(folder, *FLAGS)
    assert result.returncode == 1, result.stderr
    return folder


def test_mixed_lines_with_mistakes(mixed: Path) -> None:
    answers = records(mixed / "out.jsonl")
    others = {f"r{i}" for i in range(40)}
    assert answers.keys() - others == {"1", "tokens", "long", "4", "chat"}
    assert "not JSON" in answers["1"]["error"]["message"]
    assert "5001 tokens" in answers["long"]["error"]["message"]
    assert answers["4"]["usage"]["completion_tokens"] == 3
    body = answers["chat"]["response"]["body"]
    assert len(body["choices"][0]["logprobs"]["content"]) == 5
    tokens = answers["tokens"]
    assert [item["token_id"] for item in tokens["logprobs"]] == tokens["token_ids"]
    # Greedy: the chosen token is the likeliest.
    assert all(item["top"][0]["token_id"] == item["token_id"] for item in tokens["logprobs"])


def test_a_killed_run_resumes_to_the_same_answers(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes((mixed / "in.jsonl").read_bytes())
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *SMALL_CACHE, *FLAGS],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    assert 8 <= len(before) < 45
    result = generate(tmp_path, *FLAGS, "--resume")
    assert result.returncode == 1, result.stderr
    assert out.read_bytes().startswith(b"".join(before))
    answers, whole = records(out), records(mixed / "out.jsonl")
    assert answers.keys() == whole.keys()
    assert {name: answer.get("text") for name, answer in answers.items()} == {
        name: answer.get("text") for name, answer in whole.items()
    }
    again = generate(tmp_path, *FLAGS, "--resume")
    assert again.returncode == 1
    assert "nothing to do" in again.stdout


def test_what_cannot_run_says_so_with_code_2(tmp_path: Path) -> None:
    """Also where it shows only when both ranks load: the end of a file is gone."""
    flags = model_without_arguments(tmp_path / "megatron")
    file = tmp_path / "megatron" / "release" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 5000)
    result = generate(tmp_path, "--sp", "2", *flags, command=COMMANDS["sps2"])
    assert result.returncode == 2
    (error,) = [line for line in result.stderr.splitlines() if " INFO " not in line]
    assert "__0_0.distcp: the file ends 2911 bytes too early" in error
    result = generate(tmp_path, "--sp", "2")
    assert result.returncode == 2
    assert "2" in result.stderr
