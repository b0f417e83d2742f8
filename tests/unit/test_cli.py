from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sps2_mega.flags import config_from, flags_of

from sps2_mega import cli
from sps2_mega.config import EngineConfig, ParallelConfig
from sps2_mega.serving.batch_input import GoodLine, read_lines, scan

ROOT = Path(__file__).resolve().parents[2]

# A new flag edits this list, so that it shows in review.
GENERATE_FLAGS = {
    "input",
    "output",
    "resume",
    "overwrite",
    "retry-errors",
    "limit",
    "show",
    "max-tokens",
    "temperature",
    "top-p",
    "top-k",
    "min-p",
    "n",
    "stop",
    "stop-token-ids",
    "min-tokens",
    "ignore-eos",
    "repetition-penalty",
    "presence-penalty",
    "frequency-penalty",
    "logprobs",
}
SERVE_FLAGS = {
    "host",
    "port",
    "api-key",
    "served-model-name",
    "request-timeout",
    "max-body-bytes",
    "drain-timeout",
    "stream-keep-alive",
}


def parse(*argv: str) -> EngineConfig:
    return config_from(EngineConfig, cli.generate_parser().parse_args(argv))


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            "env",
            *(
                f"{name}={value}"
                for name, value in {"PYTHONPATH": str(ROOT), **environment}.items()
            ),
            sys.executable,
            str(ROOT / "launch" / "generate.py"),
            *argv,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_flags_are_the_frozen_ones() -> None:
    shown = set(re.findall(r"^\| `--([a-z-]+)", cli.markdown(), re.MULTILINE))
    assert shown == GENERATE_FLAGS | SERVE_FLAGS | {spec.name for spec in flags_of(EngineConfig)}


def test_docs_are_current() -> None:
    written = (ROOT / "docs" / "cli.md").read_text()
    assert written == cli.markdown(), "run: python -m sps2_mega.cli docs > docs/cli.md"


def test_nothing_given_is_the_default_configuration() -> None:
    assert parse() == EngineConfig()


def test_values_reach_nested_fields() -> None:
    config = parse(
        "--model", "m", "--tp", "2", "--sp", "4", "--sp-levels", "2,2", "--num-gpu-blocks-override", "7",
        "--gpu-memory-utilization", "0.5", "--max-num-seqs", "3", "--dtype", "float32", "--seed", "-1",
    )  # fmt: skip
    assert config.parallel == ParallelConfig(tp=2, sp=4, sp_levels=(2, 2))
    assert (config.cache.num_blocks, config.cache.memory_fraction) == (7, 0.5)
    assert (config.model, config.scheduler.max_running, config.dtype, config.seed) == (
        "m",
        3,
        "float32",
        -1,
    )


@pytest.mark.parametrize(
    "spelling", [["--local_rank", "1"], ["--local-rank=1"], ["--local_rank=1"]]
)
def test_launchers_local_rank_is_accepted_and_ignored(spelling) -> None:
    assert parse(*spelling, "--tp", "2").parallel.tp == 2
    assert "local" not in cli.generate_parser().format_help()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sp-levels", "2,x"], "integers with commas"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--temp", "1"], "unrecognized arguments"),
        (["--temperature", "-1"], "temperature must be in"),
        (["--resume", "--overwrite"], "contradict"),
        (["--retry-errors"], "--retry-errors needs --resume"),
        (["--model", "other"], "--input is needed"),
        (["--input", "absent.jsonl", "--output", "o"], "absent.jsonl is not a file"),
    ],
)
def test_mistakes_end_with_code_2_and_a_reason(argv, said) -> None:
    result = run(*argv)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_mistakes_are_told_by_rank_0_only() -> None:
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    first = run("--dtype", "int4", RANK="0", **launched)
    second = run("--dtype", "int4", RANK="1", **launched)
    assert (first.returncode, second.returncode) == (2, 2)
    assert "invalid choice" in first.stderr
    assert second.stderr == ""


def test_help_is_quick_and_loads_no_torch() -> None:
    began = time.perf_counter()
    result = run("--help")
    assert result.returncode == 0
    assert "--gpu-memory-utilization" in result.stdout
    assert time.perf_counter() - began < 1.0 * 3  # the limit is 1 s on an idle machine
    code = "import sys, sps2_mega.cli; sps2_mega.cli.generate_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_sampling_flags_are_the_defaults_of_lines(tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "x", "temperature": 1, "stop": "q"}\n')
    parser = cli.generate_parser()
    parsed = parser.parse_args(
        ["--input", str(path), "--temperature", "0", "--stop", "a", "--stop", "b"]
    )
    options = cli._batch_options(parsed, EngineConfig())
    lines = list(read_lines(path, options.sampling, scan(path, options.sampling)))
    assert [line.request.params.temperature for line in lines] == [0, 1]
    assert [line.request.params.stop for line in lines] == [("a", "b"), ("q",)]


def test_bundled_prompts_are_good_and_one_is_long() -> None:
    found = scan(cli.BUNDLED_PROMPTS, {})
    lines = list(read_lines(cli.BUNDLED_PROMPTS, {}, found))
    assert 10 <= len(lines) <= 20
    assert all(isinstance(line, GoodLine) for line in lines)
    assert found.warnings == {}
    assert max(len(line.request.prompt.encode()) for line in lines) > 2000


def test_one_liner_of_the_docs_restores_the_order(tmp_path) -> None:
    asked = [{"id": "b"}, {"prompt": "no id"}, {"custom_id": "a"}]
    answered = [{"custom_id": "a", "x": 1}, {"id": "b", "x": 2}, {"id": 2, "x": 3}]
    for name, records in (("in.jsonl", asked), ("out.jsonl", answered)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    command = re.search(r"^python -c '(.*)' in.jsonl out.jsonl$", cli.markdown(), re.MULTILINE)
    result = subprocess.run(
        [sys.executable, "-c", command.group(1), "in.jsonl", "out.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line)["x"] for line in result.stdout.splitlines()] == [2, 3, 1]
