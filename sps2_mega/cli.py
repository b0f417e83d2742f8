"""The command line: flags in, configuration out; nothing heavy is imported before the flags are
right.

    python -m sps2_mega.cli generate ...      what launch/generate.py calls, on every rank
    python -m sps2_mega.cli serve ...         the same for launch/serve.py
    python -m sps2_mega.cli docs > docs/cli.md

Engine and server flags come from the config dataclasses; flags that only `generate` has are listed
here.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sps2_mega.config import EngineConfig
from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.flag_tables import flag_tables
from sps2_mega.flags import add_flags, config_from, integers
from sps2_mega.parallel.launcher import LaunchInfo, from_environment, server_api_key
from sps2_mega.types import SamplingParams

BUNDLED_PROMPTS = Path(__file__).resolve().parents[1] / "launch" / "prompts" / "python.jsonl"
DEFAULT_OUTPUT = "out.jsonl"
_EXIT_COULD_NOT_RUN = 2

# SamplingParams field -> how the flag reads it and what it says.
_SAMPLING_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": (
        {"type": int, "metavar": "N"},
        "new tokens at most (default: 16 for prompts, the rest of the context for messages)",
    ),
    "temperature": ({"type": float, "metavar": "X"}, "0 is greedy (default: 1)"),
    "top_p": ({"type": float, "metavar": "X"}, "sample from the likeliest tokens that sum to X"),
    "top_k": (
        {"type": int, "metavar": "N"},
        "sample from the N likeliest tokens (default: 0, off)",
    ),
    "min_p": (
        {"type": float, "metavar": "X"},
        "sample from tokens at least X times as likely as the likeliest",
    ),
    "n": ({"type": int, "metavar": "N"}, "answers per request"),
    "stop": (
        {"action": "append", "metavar": "TEXT"},
        "end an answer before this text; can be given several times",
    ),
    "stop_token_ids": ({"type": integers, "metavar": "N,N"}, "end an answer at these tokens"),
    "min_tokens": ({"type": int, "metavar": "N"}, "no end of text before N new tokens"),
    "ignore_eos": ({"action": "store_true"}, "go on past the end of text"),
    "repetition_penalty": (
        {"type": float, "metavar": "X"},
        "divide scores of tokens seen in prompt or answer",
    ),
    "presence_penalty": (
        {"type": float, "metavar": "X"},
        "subtract from scores of tokens seen in the answer",
    ),
    "frequency_penalty": (
        {"type": float, "metavar": "X"},
        "the same, times how often they were seen",
    ),
    "logprobs": (
        {"type": int, "metavar": "N"},
        "write log-probabilities of the chosen and the N likeliest tokens",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["docs"]:
        print(markdown(), end="")
        return 0
    if arguments[:1] == ["generate"]:
        return generate(arguments[1:])
    if arguments[:1] == ["serve"]:
        return serve(arguments[1:])
    print("usage: python -m sps2_mega.cli {generate,serve,docs} ...", file=sys.stderr)
    return 0 if arguments[:1] in (["-h"], ["--help"]) else _EXIT_COULD_NOT_RUN


def generate(argv: Sequence[str] | None = None) -> int:
    """Answers a file of requests; to be called on every rank. Exit codes: 0, 1 some failed, 2 could
    not run."""
    try:
        info = from_environment()
    except ConfigError as error:
        print(f"sps2_mega: error: {error}", file=sys.stderr)
        return _EXIT_COULD_NOT_RUN
    parser = generate_parser(quiet=info.rank > 0)
    parsed = parser.parse_args(argv)
    try:
        config = config_from(EngineConfig, parsed)
        options = _batch_options(parsed, config)
    except (ConfigError, RequestError) as error:
        parser.error(str(error))
    _log_to_stderr(info)

    from sps2_mega.serving.generate import run_generate

    return run_generate(config, options, info)


def serve(argv: Sequence[str] | None = None) -> int:
    """Serves the OpenAI API until told to stop; to be called on every rank. Exit codes: 0 stopped
    in good order, 2 could not start, others as the job failed."""
    try:
        info = from_environment()
    except ConfigError as error:
        print(f"sps2_mega: error: {error}", file=sys.stderr)
        return _EXIT_COULD_NOT_RUN
    parser = serve_parser(quiet=info.rank > 0)
    parsed = parser.parse_args(argv)
    from sps2_mega.serving.http.settings import ServerConfig, for_serving

    try:
        config = for_serving(config_from(EngineConfig, parsed))
        server = config_from(ServerConfig, parsed)
        if server.api_key is None:
            server = dataclasses.replace(server, api_key=server_api_key())
    except ConfigError as error:
        parser.error(str(error))
    _log_to_stderr(info)

    from sps2_mega.serving.serve import run_serve

    return run_serve(config, server, info)


def serve_parser(*, quiet: bool = False) -> argparse.ArgumentParser:
    """All flags of `serve`. `quiet`: mistakes are reported by another rank."""
    from sps2_mega.serving.http.settings import ServerConfig

    parser = _Parser(
        prog="serve.py",
        description="Serve a model on tp * sp ranks through the OpenAI API.",
        allow_abbrev=False,
    )
    parser.quiet = quiet
    add_flags(parser.add_argument_group("server"), ServerConfig)
    add_flags(parser.add_argument_group("engine"), EngineConfig)
    _accept_local_rank(parser)
    return parser


def generate_parser(*, quiet: bool = False) -> argparse.ArgumentParser:
    """All flags of `generate`. `quiet`: mistakes are reported by another rank."""
    parser = _Parser(
        prog="generate.py",
        description="Answer a file of requests with a model on tp * sp ranks.",
        allow_abbrev=False,
    )
    parser.quiet = quiet
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="JSON lines: prompts, messages or OpenAI batch lines (default: bundled prompts, for "
        "sps2-tiny only)",
    )
    files.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        default=Path(DEFAULT_OUTPUT),
        help=f"one JSON line per answer, as they finish (default: {DEFAULT_OUTPUT})",
    )
    files.add_argument("--resume", action="store_true", help="answer only what the output lacks")
    files.add_argument("--overwrite", action="store_true", help="replace an existing output")
    files.add_argument(
        "--retry-errors", action="store_true", help="with --resume: answer failed lines again"
    )
    files.add_argument(
        "--limit", type=int, metavar="N", help="only the first N requests of the input"
    )
    files.add_argument(
        "--show",
        type=int,
        metavar="N",
        help="print the first N answers that finish (default: all bundled prompts, else none)",
    )
    sampling = parser.add_argument_group("sampling, for requests that do not say otherwise")
    for name, (settings, text) in _SAMPLING_FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        sampling.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **settings)
    add_flags(parser.add_argument_group("engine"), EngineConfig)
    _accept_local_rank(parser)
    return parser


def _accept_local_rank(parser: argparse.ArgumentParser) -> None:
    """Launchers add it; the rank comes from the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def markdown() -> str:
    """docs/cli.md, from the parsers."""
    lines = [
        "# Command line",
        "",
        "Made by `python -m sps2_mega.cli docs > docs/cli.md`; do not edit.",
        "",
        "`launch/generate.py` runs under `deepspeed`, `torchrun` or plain `python` with the "
        "flags below.",
        "Exit codes: 0 all lines were answered, 1 some lines failed, 2 it could not run.",
        "",
        "Answers are written as they finish. Ids restore the order of the input:",
        "",
        "```",
        'python -c \'import json,sys; a={str(r.get("custom_id",r.get("id"))):r for r in '
        "map(json.loads,open(sys.argv[2]))}; "
        '[print(json.dumps(a[str(q.get("custom_id",q.get("id",i)))])) '
        "for i,q in enumerate(map(json.loads,open(sys.argv[1])),1)]' in.jsonl out.jsonl",
        "```",
    ]
    lines += flag_tables(generate_parser())
    lines += [
        "",
        "# Server",
        "",
        "`launch/serve.py` takes the engine flags above and these; what they do is in "
        "`docs/serving.md`.",
        "Exit codes: 0 stopped in good order, 2 could not start, anything else: a rank failed or "
        "was told to end at once.",
    ]
    lines += flag_tables(serve_parser(), only="server")
    return "\n".join(lines) + "\n"


class _Parser(argparse.ArgumentParser):
    quiet = False

    def error(self, message: str) -> NoReturn:
        if self.quiet:
            sys.exit(_EXIT_COULD_NOT_RUN)
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        if not self.quiet:
            super().print_help(file)


def _batch_options(parsed: argparse.Namespace, config: EngineConfig) -> Any:
    from sps2_mega.serving.batch import BatchOptions
    from sps2_mega.serving.batch_output import OutputMode

    if parsed.resume and parsed.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")
    if parsed.retry_errors and not parsed.resume:
        raise ConfigError("--retry-errors needs --resume")
    bundled = parsed.input is None and config.model == EngineConfig().model
    if parsed.input is None and not (bundled and BUNDLED_PROMPTS.is_file()):
        raise ConfigError("--input is needed: a file with one JSON request per line")
    mode = OutputMode.NEW
    if parsed.resume or parsed.overwrite:
        mode = OutputMode.RESUME if parsed.resume else OutputMode.OVERWRITE
    return BatchOptions(
        input=BUNDLED_PROMPTS if bundled else parsed.input,
        output=parsed.output,
        sampling=_sampling(parsed),
        mode=mode,
        retry_errors=parsed.retry_errors,
        limit=parsed.limit,
        show=parsed.show if parsed.show is not None else 1000 if bundled else 0,
    )


def _sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    """Only what was given, checked."""
    given = {name: getattr(parsed, name) for name in _SAMPLING_FLAGS if hasattr(parsed, name)}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    SamplingParams(**{"max_tokens": None, **given})
    return given


def _log_to_stderr(info: LaunchInfo) -> None:
    where = f" rank {info.rank}" if info.world_size > 1 else ""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if info.rank == 0 else logging.WARNING,
        format=f"%(asctime)s %(levelname)s{where} %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in ("megatron", "deepspeed", "DeepSpeed", "torch", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
