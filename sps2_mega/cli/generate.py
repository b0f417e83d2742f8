"""`sps2 generate`: answer a file of requests.

Engine flags are those of EngineConfig; flags that only this command has are listed here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2_mega.bundled import bundled_prompts
from sps2_mega.cli.flags import config_from, integers
from sps2_mega.cli.parser import EXIT_COULD_NOT_RUN, ConfigParser
from sps2_mega.cli.rank_logging import log_to_stderr
from sps2_mega.config import EngineConfig
from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.parallel.launcher import from_environment
from sps2_mega.types import SamplingParams

DEFAULT_OUTPUT = "out.jsonl"

# SamplingParams field -> settings of its flag, and its help.
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
        "subtract this times how often they were seen",
    ),
    "logprobs": (
        {"type": int, "metavar": "N"},
        "write log-probabilities of the chosen and the N likeliest tokens",
    ),
}


def main(
    argv: Sequence[str] | None = None, *, prog: str = "sps2 generate", starts_ranks: bool = True
) -> int:
    """Answer a file of requests; called on every rank.

    Without a launcher, `starts_ranks` starts the other ranks on this machine. Exit codes: 0, 1 some
    lines failed, 2 could not run.
    """
    try:
        info = from_environment()
    except ConfigError as error:
        print(f"sps2_mega: error: {error}", file=sys.stderr)
        return EXIT_COULD_NOT_RUN
    parser = generate_parser(prog=prog, quiet=info.rank > 0)
    parsed = parser.parse_args(argv)
    try:
        config = config_from(EngineConfig, parsed)
        options = batch_options(parsed, config)
    except (ConfigError, RequestError) as error:
        parser.error(str(error))
    log_to_stderr(info, parsed.notes)

    from sps2_mega.serving.generate import run_generate

    return run_generate(config, options, info, starts_ranks=starts_ranks)


def generate_parser(*, prog: str = "sps2 generate", quiet: bool = False) -> ConfigParser:
    """All flags of `generate`; a `quiet` parser leaves mistakes to another rank."""
    parser = ConfigParser(
        prog=prog,
        description="Answer a file of requests with a model on tp * sp ranks.",
        quiet=quiet,
    )
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
    parser.add_configs({"engine": EngineConfig})
    return parser


def batch_options(parsed: argparse.Namespace, config: EngineConfig) -> Any:
    """BatchOptions of the flags.

    Raises:
        ConfigError, RequestError: flags contradict each other, or the input is missing.
    """
    from sps2_mega.serving.batch import BatchOptions
    from sps2_mega.serving.batch_output import OutputMode

    if parsed.resume and parsed.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")
    if parsed.retry_errors and not parsed.resume:
        raise ConfigError("--retry-errors needs --resume")
    bundled = None
    if parsed.input is None and config.model == EngineConfig().model:
        bundled = bundled_prompts()
    if parsed.input is None and bundled is None:
        raise ConfigError("--input is needed: a file with one JSON request per line")
    mode = OutputMode.NEW
    if parsed.resume or parsed.overwrite:
        mode = OutputMode.RESUME if parsed.resume else OutputMode.OVERWRITE
    return BatchOptions(
        input=bundled or parsed.input,
        output=parsed.output,
        sampling=_sampling(parsed),
        mode=mode,
        retry_errors=parsed.retry_errors,
        limit=parsed.limit,
        show=parsed.show if parsed.show is not None else 1000 if bundled else 0,
    )


def _sampling(parsed: argparse.Namespace) -> dict[str, Any]:
    """Sampling parameters that were given, checked."""
    given = {name: getattr(parsed, name) for name in _SAMPLING_FLAGS if hasattr(parsed, name)}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    SamplingParams(**{"max_tokens": None, **given})
    return given
