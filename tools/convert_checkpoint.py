"""Converts a checkpoint between Hugging Face and Megatron, tensor by tensor and bit for bit.

    python tools/convert_checkpoint.py hf-to-megatron SRC DST
    python tools/convert_checkpoint.py megatron-to-hf SRC DST

SRC may be in any format that the runtime reads; the direction says what DST becomes. DST must not
exist or be empty. Tokenizer files travel along.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # works from a checkout that is not installed
    sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # torch takes seconds to import: not before the arguments are known to be right.
    from tqdm import tqdm

    from sps2_mega.checkpoint.export import export_huggingface, export_megatron
    from sps2_mega.checkpoint.sharding import num_parameters
    from sps2_mega.checkpoint.source import open_checkpoint
    from sps2_mega.errors import CheckpointError, ConfigError

    try:
        config = _named_config(args.config) if args.config else None
        source = open_checkpoint(args.source, config)
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

            export(source, args.target, on_bytes=progress)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.target}: {num_parameters(source.config):,} parameters of {source.path} "
        f"({source.format}, {source.dtype})"
    )
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint between Hugging Face and Megatron (torch_dist)."
    )
    parser.add_argument("direction", choices=("hf-to-megatron", "megatron-to-hf"))
    parser.add_argument("source", type=Path, metavar="SRC", help="the checkpoint's folder")
    parser.add_argument("target", type=Path, metavar="DST", help="a folder that is absent or empty")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="architecture from model_configs/ instead of the one that SRC states",
    )
    return parser.parse_args(argv)


def _named_config(name: str):  # type: ignore[no-untyped-def]
    from sps2_mega.checkpoint.model_file import named_model_file

    return named_model_file(name).config


if __name__ == "__main__":
    sys.exit(main())
