"""Former spellings of flags: still accepted, with one log line that names today's.

They go with the release after 0.1; then this module goes too.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from sps2_mega.cli.flags import FieldSpec, add_flag
from sps2_mega.errors import ConfigError

# Former flag -> path of its field.
FORMER_FLAGS = {
    "kv-memory-fraction": "cache.memory_fraction",
    "num-kv-blocks": "cache.num_blocks",
    "no-prefix-caching": "cache.no_prefix_caching",
    "block-size": "cache.block_size",
    "max-prefill-tokens": "scheduler.max_prefill_tokens",
    "max-queue": "scheduler.max_waiting",
    "chunk-tokens": "scheduler.chunk_tokens",
    "overtake": "scheduler.overtake",
    "decode-tp": "parallel.decode_tp",
    "csa-spans": "csa.spans",
    "csa-sinks": "csa.sinks",
    "csa-halo": "csa.halo",
    "csa-tail": "csa.tail",
    "csa-sample-queries": "csa.sample_queries",
    "csa-block": "csa.block",
    "micro-batches": "micro_batches",
    "step-timeout": "step_timeout",
    "request-timeout": "request_timeout",
    "max-body-bytes": "max_body_bytes",
    "stream-keep-alive": "stream_keep_alive",
}
PREFILL_RANKS = "prefill-ranks"  # never more than a check of tp * sp


def add_former_flags(parser: argparse.ArgumentParser, fields: Mapping[str, FieldSpec]) -> None:
    """Add the former spellings of these fields, unseen in --help."""
    for flag, path in FORMER_FLAGS.items():
        if path in fields:
            add_flag(
                parser, fields[path], f"--{flag}", help=argparse.SUPPRESS, dest=f"former:{flag}"
            )
    parser.add_argument(
        f"--{PREFILL_RANKS}", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def take_former_flags(
    parsed: argparse.Namespace, fields: Mapping[str, FieldSpec]
) -> tuple[str, ...]:
    """Move values given by former flags to their fields; return a log line for each.

    Raises:
        ConfigError: a field was given by its former and by its present name.
    """
    given = vars(parsed)
    notes = []
    for flag, path in FORMER_FLAGS.items():
        if f"former:{flag}" not in given:
            continue
        value = given.pop(f"former:{flag}")
        today = present_form(fields[path], value)
        if path in given:
            raise ConfigError(f"--{flag} is the former name of {today}: give one of them")
        given[path] = value
        notes.append(f"--{flag} is deprecated: use {today}")
    ranks = given.pop(PREFILL_RANKS.replace("-", "_"), None)
    if ranks is not None:
        tp, sp = given.get("parallel.tp", 1), given.get("parallel.sp", 1)
        if ranks != tp * sp:
            raise ConfigError(
                f"--{PREFILL_RANKS} must be tp * sp: {ranks}, but tp={tp} * sp={sp} = {tp * sp}"
            )
        notes.append(f"--{PREFILL_RANKS} is deprecated and not needed: it is always tp * sp")
    return tuple(notes)


def present_form(spec: FieldSpec, value: object) -> str:
    """The flag of a field, else its --override with this value."""
    if spec.flag is not None:
        return f"--{spec.flag}"
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--override {spec.path}={shown.lower() if isinstance(value, bool) else shown}"
