"""Reading of the written folders with the megatron-core that is installed, and the oracles."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from dist.checkpoint import checkpoint_writer as writer
from model_run import TRANSPORTS, largest_differences
from torch import Tensor
from unit.checkpoint.checkpoints import MemorySource

from checkpoint_table import cells
from sps2_mega.checkpoint.export import export_huggingface
from sps2_mega.checkpoint.source import open_checkpoint, read_canonical
from sps2_mega.errors import CheckpointError, ConfigError


@dataclass
class Outcome:
    """What became of one folder; `failure` is empty if all was as it has to be."""

    failure: str = ""
    refusal: str = ""
    differences: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        return max(self.differences.values(), default=0.0)


def outcomes(roots: dict[str, Path], scratch: Path) -> dict[tuple[str, str], Outcome]:
    """Outcome of every (release, folder) below the roots of the releases."""
    found = {
        (release, folder): Outcome(*_tensors(root / folder, kind, shape))
        for release, root in roots.items()
        for _, kind, shape, folder in cells.places()
    }
    reference = transformers_logits(scratch)
    expected: dict[str, list[Tensor]] = {}
    folders: dict[str, Path] = {}
    for (release, folder), outcome in found.items():
        if not outcome.refusal and not outcome.failure:
            folders[f"{release}/{folder}"] = roots[release] / folder
            expected[f"{release}/{folder}"] = reference
    for release, root in roots.items():
        own = torch.load(root / "logits.pt")
        for name in cells.SETTINGS:
            folder = cells.settings_folder(name)
            found[release, folder] = Outcome()
            folders[f"{release}/{folder}"] = root / folder
            expected[f"{release}/{folder}"] = [
                logits[:, : cells.MODEL.vocab_size] for logits in own[name]
            ]
    for tp, sp in cells.READERS:
        measured = largest_differences(
            expected,
            folders,
            cells.prompts(),
            tp=tp,
            sp=sp,
            transports=TRANSPORTS if sp > 1 else TRANSPORTS[:1],
            timeout=1200,
        )
        for (name, transport), (difference, where) in measured.items():
            release, _, folder = name.partition("/")
            outcome = found[release, folder]
            before = outcome.differences.get((tp, sp), 0.0)
            outcome.differences[tp, sp] = max(before, difference)
            if not difference < cells.TOLERANCE:
                outcome.failure = f"TP {tp}, SP {sp}, {transport}, {where}: off by {difference:.1e}"
    return found


def transformers_logits(scratch: Path) -> list[Tensor]:
    """Logits of transformers' own model with the weights that every writer was given."""
    import transformers

    source = MemorySource(cells.MODEL)
    source.weights = writer.canonical_weights(cells.MODEL, cells.STD)
    export_huggingface(source, scratch)
    model = transformers.AutoModelForCausalLM.from_pretrained(scratch).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0] for prompt in cells.prompts()]


def _tensors(folder: Path, kind: cells.Format, shape: cells.Shape) -> tuple[str, str]:
    """(failure, refusal) of opening a folder and reading every tensor of it."""
    try:
        source = open_checkpoint(folder)
        if kind.refused:
            return f"not refused, needs a refusal that names {kind.refused}", ""
        if source.config != cells.MODEL:
            return f"another architecture: {source.config}", ""
        if source.saved_layout != (shape.tp, shape.pp) or source.iteration != writer.ITERATION:
            return f"saved_layout {source.saved_layout}, iteration {source.iteration}", ""
        for name, expected in writer.canonical_weights(cells.MODEL, cells.STD).items():
            if not torch.equal(read_canonical(source, name, source.config), expected):
                return f"{name} differs", ""
    except (CheckpointError, ConfigError) as error:
        text = str(error)
        if kind.refused and kind.refused in text and "\n" not in text:
            return "", text
        return text, ""
    return "", ""
