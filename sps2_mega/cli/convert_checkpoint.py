"""`sps2 convert`: a checkpoint from Hugging Face to Megatron or back, bit for bit.

    sps2 convert hf-to-megatron SRC DST
    sps2 convert megatron-to-hf SRC DST

SRC may be in any format that the runtime reads. DST must be absent or empty. Tensors are read and
written one by one; tokenizer files are copied.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None, *, prog: str = "sps2 convert") -> int:
    """Convert one checkpoint; exit code 2 where it cannot be converted."""
    args = parse(argv, prog=prog)
    # torch takes seconds to import: not before the arguments are known to be right.
    from tqdm import tqdm

    from sps2_mega.checkpoint.export import export_huggingface, export_megatron
    from sps2_mega.checkpoint.given_config import given_config
    from sps2_mega.checkpoint.sharding import num_parameters
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.errors import CheckpointError, ConfigError

    try:
        config = given_config(args.config) if args.config else None
        source = open_checkpoint(args.source, config, tokens=args.tokenizer)
        expected = "huggingface" if args.direction == "hf-to-megatron" else "megatron"
        if not source.format.startswith(expected):
            raise ConfigError(
                f"{args.source} is a {source.format} checkpoint, not a {expected} one"
            )
        export = export_megatron if args.direction == "hf-to-megatron" else export_huggingface
        with tqdm(unit="B", unit_scale=True, desc="converting", delay=0.2) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            export(source, args.target, tokens=args.tokenizer, on_bytes=progress)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.target}: {num_parameters(source.config):,} parameters of {source.path} "
        f"({source.format}, {source.dtype})"
    )
    return 0


def parse(argv: Sequence[str] | None, *, prog: str) -> argparse.Namespace:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Convert a checkpoint between Hugging Face and Megatron (torch_dist).",
    )
    parser.add_argument("direction", choices=("hf-to-megatron", "megatron-to-hf"))
    parser.add_argument("source", type=Path, metavar="SRC", help="the checkpoint's folder")
    parser.add_argument("target", type=Path, metavar="DST", help="a folder that is absent or empty")
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="architecture in place of the one that SRC states: a name in model_configs/, or a "
        "file (YAML as there, or a config.json)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="tokenizer to copy, which says which rows of a Megatron SRC are tokens (default: "
        "SRC's own)",
    )
    return parser.parse_args(argv)
