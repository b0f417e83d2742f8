"""Training and evaluation of the bundled byte-level model.

    python benchmarks/train_tiny.py [--output out/train] [--device cpu|cuda]   trains, evaluates
    python benchmarks/train_tiny.py --evaluate model_configs/sps2-tiny         evaluates only

The data are Python's own sources and generated long-range tasks. Everything that influences the
weights is in benchmarks/train/sps2-tiny.yaml. An interrupted run continues when it is started
again. The output folder gets

    model/           Hugging Face folder: config, bfloat16 weights, tokenizer
    checkpoint.pt    what a resumed run needs
    log.jsonl        loss, bits per byte and found digits of training batches
    curve.png        the same as a picture (needs matplotlib, extra `bench`)
    evaluation.json  held-out bits per byte beside gzip, xz and a 5-gram model; retrieval by length
                     and depth

Exit code 2 if the command cannot run as given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # works from a checkout that is not installed
    sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from benchmarks.train.config import TrainConfig
    from benchmarks.train.corpus import Corpus
    from benchmarks.train.model import TinyLlama

CONFIG = ROOT / "tools" / "train" / "sps2-tiny.yaml"
LENGTHS = (512, 1024, 2048, 4096, 8192)
# Attention of long documents is most of an evaluation's time: they get a quarter of the probes.
LONG = 4096
EVALUATION_SEED = 7


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    import torch

    from benchmarks.train.config import load_train_config
    from benchmarks.train.corpus import read_corpus
    from sps2_mega.errors import CheckpointError, ConfigError

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = load_train_config(args.config, device)
        corpus = read_corpus(config.corpus)
        if args.evaluate:
            from benchmarks.train.export import load_model

            facts = evaluate(load_model(args.evaluate).to(device), corpus, args.probes)
            print(json.dumps(facts, indent=2))
        else:
            train(config, corpus, device, args)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: TrainConfig, corpus: Corpus, device: str, args: argparse.Namespace) -> None:
    """Train, or continue a run, and write all files of the output folder.

    Raises:
        ConfigError: the output folder is another configuration's.
    """
    from benchmarks.train.export import save_model
    from benchmarks.train.loop import Trainer, write_log

    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, log = output / "checkpoint.pt", output / "log.jsonl"
    if args.overwrite:
        checkpoint.unlink(missing_ok=True)
    trainer = Trainer(config, corpus, device)
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"going on after step {trainer.step} of {config.num_steps}")
    trainer.train(config.num_steps, checkpoint, lambda: write_log(trainer.log, log))
    save_model(trainer.model, output / "model")
    _draw(trainer.log, output / "curve.png")
    facts = evaluate(trainer.model.eval(), corpus, args.probes)
    facts |= {"steps": trainer.step, "seconds": round(trainer.seconds), "device": device}
    (output / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))
    print(f"model: {output / 'model'}")


def evaluate(model: TinyLlama, corpus: Corpus, num_probes: int) -> dict[str, Any]:
    """Evaluation as plain values; lengths beyond the model's configured context are left out."""
    from benchmarks.train.baselines import baseline_bits_per_byte
    from benchmarks.train.evaluate import TASKS, bits_per_byte, retrieval

    lengths = [n for n in LENGTHS if n <= model.config.max_position_embeddings]
    began = time.perf_counter()
    bits = {f"model, windows of {n}": bits_per_byte(model, corpus.held_out, n) for n in lengths}
    found = {
        task: {
            str(length): retrieval(
                model,
                corpus.held_out,
                task=task,
                length=length,
                num_probes=num_probes if length < LONG else num_probes // 4,
                seed=EVALUATION_SEED,
            )
            for length in lengths
        }
        for task in TASKS
    }
    return {
        "python": sys.version.split()[0],
        "held_out_files": len(corpus.held_out),
        "held_out_bytes": sum(len(text) for text in corpus.held_out.values()),
        "bits_per_byte": bits | baseline_bits_per_byte(corpus),
        "retrieval_exact_match": found,
        "evaluation_seconds": round(time.perf_counter() - began),
    }


def _draw(records: list[dict[str, float]], path: Path) -> None:
    from benchmarks.train.curve import draw_curve

    try:
        draw_curve(records, path)
    except ImportError:
        print("no loss curve: matplotlib is not installed (pip install 'sps2_mega[bench]')")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train or evaluate the bundled model.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of the run")
    parser.add_argument("--output", type=Path, default=Path("out/train"), help="folder of the run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads, all unless given")
    parser.add_argument("--overwrite", action="store_true", help="begin again, resume nothing")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="train nothing, measure DIR")
    parser.add_argument(
        "--probes",
        type=int,
        default=200,
        help="probes per task and length (a quarter from 4096 on)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
