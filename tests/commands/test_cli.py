from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sps2_mega import __version__
from sps2_mega.bundled import bundled_prompts
from sps2_mega.cli.documentation import markdown
from sps2_mega.cli.flags import config_from, fields_of, flags_of
from sps2_mega.cli.former_flags import FORMER_FLAGS
from sps2_mega.cli.generate import batch_options, generate_parser
from sps2_mega.cli.main import COMMANDS, main
from sps2_mega.cli.rank_logging import log_to_stderr
from sps2_mega.cli.serve import serve_parser
from sps2_mega.config import EngineConfig, ParallelConfig
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.serving.batch_input import GoodLine, read_lines, scan
from sps2_mega.serving.http.settings import ServerConfig

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
SERVE_FLAGS = {"host", "port", "api-key", "served-model-name", "drain-timeout"}
MAX_FLAGS = 55


def parse(*argv: str) -> EngineConfig:
    return config_from(EngineConfig, generate_parser().parse_args(argv))


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


def test_flags_are_the_frozen_ones_and_few() -> None:
    shown = re.findall(r"^\| `--([a-z-]+)", markdown(), re.MULTILINE)
    assert len(shown) == len(set(shown)) <= MAX_FLAGS
    assert set(shown) == GENERATE_FLAGS | SERVE_FLAGS | flags_of(EngineConfig).keys() | {"override"}
    assert flags_of(ServerConfig).keys() == SERVE_FLAGS


def test_docs_are_current() -> None:
    written = (ROOT / "docs" / "cli.md").read_text()
    assert written == markdown(), "run: sps2 docs > docs/cli.md"


def test_every_field_has_a_flag_or_a_row_among_the_others() -> None:
    text = markdown()
    for spec in [*fields_of(EngineConfig), *fields_of(ServerConfig)]:
        assert spec.help, spec.path
        assert (f"| `--{spec.flag}" if spec.flag else f"| `{spec.path}=") in text


def test_nothing_given_is_the_default_configuration() -> None:
    assert parse() == EngineConfig()


def test_values_reach_nested_fields() -> None:
    config = parse(
        "--model", "m", "--tp", "2", "--sp", "4", "--sp-levels", "2,2",
        "--num-gpu-blocks-override", "7", "--gpu-memory-utilization", "0.5", "--max-num-seqs", "3",
        "--max-num-batched-tokens", "100", "--max-num-queued-reqs", "9", "--dtype", "float32",
        "--no-enable-prefix-caching", "--seed", "-1",
    )  # fmt: skip
    assert config.parallel == ParallelConfig(tp=2, sp=4, sp_levels=(2, 2))
    assert (config.cache.num_blocks, config.cache.memory_fraction) == (7, 0.5)
    assert config.cache.no_prefix_caching
    scheduler = config.scheduler
    assert (scheduler.max_running, scheduler.max_prefill_tokens, scheduler.max_waiting) == (
        3,
        100,
        9,
    )
    assert (config.model, config.dtype, config.seed) == ("m", "float32", -1)


@pytest.mark.parametrize("spelling", ["--tp", "--tensor-parallel-size", "-tp"])
def test_tp_has_vllms_spellings_too(spelling) -> None:
    assert parse(spelling, "4").parallel.tp == 4


def test_overrides_have_the_types_of_their_fields() -> None:
    given = {
        "csa.spans": ("64,256", (64, 256)),
        "csa.halo": ("7", 7),
        "csa.sample_queries": ("true", True),
        "scheduler.overtake": ("0.5", 0.5),
        "parallel.decode_tp": ("none", None),
        "cache.block_size": ("8", 8),
        "dtype": ("float32", "float32"),
        "step_timeout": ("9", 9.0),
    }
    config = parse(*(f"--override={path}={text}" for path, (text, _) in given.items()))
    for path, (_, value) in given.items():
        found = config
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path
    assert parse("--override", "csa.halo=1", "--override", "csa.halo=2").csa.halo == 2


def test_overrides_reach_the_server() -> None:
    parsed = serve_parser().parse_args(
        ["--override", "max_body_bytes=10", "--override", "csa.tail=5"]
    )
    assert config_from(ServerConfig, parsed).max_body_bytes == 10
    assert config_from(EngineConfig, parsed).csa.tail == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("csa.hallo=1", "--override csa.hallo=1: there is no field 'csa.hallo'; nearest are csa.h"),
        ("halo=1", "there is no field 'halo'; nearest are csa.halo"),
        ("max_body_bytes=1", "there is no field 'max_body_bytes'"),
        ("csa.halo=x", "--override csa.halo=x: csa.halo is an integer, got 'x'"),
        ("csa.halo=none", "csa.halo is an integer, got 'none'"),
        ("csa.spans=1,y", "csa.spans is integers with commas or none, got '1,y'"),
        ("csa.sample_queries=1", "csa.sample_queries is true or false, got '1'"),
        ("dtype=int4", "dtype is one of auto, float32, bfloat16, float16, got 'int4'"),
        ("csa.halo", "--override needs FIELD=VALUE, as csa.halo=256; got 'csa.halo'"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_one_line_with_what_was_given(override, said, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse("--override", override)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert said in line


@pytest.mark.parametrize("flag", sorted(FORMER_FLAGS))
def test_a_former_flag_is_taken_and_todays_form_is_logged(flag, caplog) -> None:
    fields = {s.path: s for s in [*fields_of(EngineConfig), *fields_of(ServerConfig)]}
    spec = fields[FORMER_FLAGS[flag]]
    value = [] if spec.kind is bool else ["3,5" if spec.metavar == "N,N" else "3"]
    parsed = serve_parser().parse_args([f"--{flag}", *value])
    expected = True if spec.kind is bool else spec.read(value[0])
    assert vars(parsed)[spec.path] == expected
    log_to_stderr(from_environment({}), parsed.notes)
    [record] = caplog.records
    shown = "true" if spec.kind is bool else value[0] + ".0" * (spec.metavar == "X")
    today = f"--{spec.flag}" if spec.flag else f"--override {spec.path}={shown}"
    assert record.getMessage() == f"--{flag} is deprecated: use {today}"
    if spec.flag is None:
        again = serve_parser().parse_args(today.split())
        assert vars(again)[spec.path] == expected
    assert f"--{flag}" not in serve_parser().format_help().split()


def test_former_flags_are_logged_by_rank_0_only(caplog) -> None:
    second = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    log_to_stderr(from_environment(second), ("x is deprecated",))
    assert not caplog.records


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num-kv-blocks", "3", "--num-gpu-blocks-override", "3"], "give one of them"),
        (["--csa-halo", "3", "--override", "csa.halo=3"], "give one of them"),
        (["--tp", "2", "--override", "parallel.tp=2"], "--override parallel.tp and --tp are"),
        (["--sp", "2", "--prefill-ranks", "3"], "--prefill-ranks must be tp * sp: 3, but"),
    ],
)
def test_a_field_given_by_two_names_is_an_error(argv, said, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)
    assert said in capsys.readouterr().err


def test_prefill_ranks_is_only_checked() -> None:
    parsed = generate_parser().parse_args(["--sp", "2", "--prefill-ranks", "2"])
    assert config_from(EngineConfig, parsed) == parse("--sp", "2")
    assert "--prefill-ranks is deprecated" in parsed.notes[0]


@pytest.mark.parametrize(
    "spelling", [["--local_rank", "1"], ["--local-rank=1"], ["--local_rank=1"]]
)
def test_launchers_local_rank_is_accepted_and_ignored(spelling) -> None:
    assert parse(*spelling, "--tp", "2").parallel.tp == 2
    assert "local" not in generate_parser().format_help()


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_loads_no_torch(command) -> None:
    code = (
        "import sys, time\n"
        "began = time.process_time()\n"
        "from sps2_mega.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'megatron', 'pydantic'} & sys.modules.keys()\n"
        "print(time.process_time() - began, heavy, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, heavy = result.stderr.split(maxsplit=1)
    assert f"usage: sps2 {command} " in result.stdout
    assert heavy.strip() == "set()"
    assert float(seconds) < 1.0, "processor time"


def test_scripts_for_launchers_have_the_same_flags() -> None:
    result = run("--help")
    assert result.returncode == 0
    first, _, rest = result.stdout.partition("[-h]")
    assert first == "usage: generate.py "
    assert "--gpu-memory-utilization" in rest and "--kv-memory-fraction" not in rest


def test_the_command_without_a_command(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sps2 {__version__}\n"
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert main([]) == main(["sing"]) == 2
    assert "unknown command 'sing'" in capsys.readouterr().err


def test_sampling_flags_are_the_defaults_of_lines(tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "x", "temperature": 1, "stop": "q"}\n')
    parser = generate_parser()
    parsed = parser.parse_args(
        ["--input", str(path), "--temperature", "0", "--stop", "a", "--stop", "b"]
    )
    options = batch_options(parsed, EngineConfig())
    lines = list(read_lines(path, options.sampling, scan(path, options.sampling)))
    assert [line.request.params.temperature for line in lines] == [0, 1]
    assert [line.request.params.stop for line in lines] == [("a", "b"), ("q",)]


def test_bundled_prompts_are_good_and_one_is_long() -> None:
    found = scan(bundled_prompts(), {})
    lines = list(read_lines(bundled_prompts(), {}, found))
    assert 10 <= len(lines) <= 20
    assert all(isinstance(line, GoodLine) for line in lines)
    assert found.warnings == {}
    assert max(len(line.request.prompt.encode()) for line in lines) > 2000


def test_one_liner_of_the_docs_restores_the_order(tmp_path) -> None:
    asked = [{"id": "b"}, {"prompt": "no id"}, {"custom_id": "a"}]
    answered = [{"custom_id": "a", "x": 1}, {"id": "b", "x": 2}, {"id": 2, "x": 3}]
    for name, records in (("in.jsonl", asked), ("out.jsonl", answered)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    command = re.search(r"^python -c '(.*)' in.jsonl out.jsonl$", markdown(), re.MULTILINE)
    result = subprocess.run(
        [sys.executable, "-c", command.group(1), "in.jsonl", "out.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line)["x"] for line in result.stdout.splitlines()] == [2, 3, 1]
