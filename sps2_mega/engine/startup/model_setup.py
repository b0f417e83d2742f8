"""Load this rank's part of the model: allocate parameters, then read or make up the weights."""

from __future__ import annotations

from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.random_weights import fill_random
from sps2_mega.checkpoint.resolve import ResolvedModel
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.engine.startup.load_progress import LoadProgress
from sps2_mega.mcore.gpt import GPT
from sps2_mega.mcore.init import Compute
from sps2_mega.parallel.groups import ParallelGroups


def load_model(
    load_format: str,
    resolved: ResolvedModel,
    groups: ParallelGroups,
    compute: Compute,
    progress: LoadProgress,
) -> GPT:
    """Model of this rank with its weights. With `load_format` dummy no file of the model is read.

    Raises:
        CheckpointError: the checkpoint does not hold exactly this model.
    """
    gpt = GPT(resolved.config, groups, dtype=compute.dtype, device=compute.device)
    if load_format == "dummy":
        fill_random(gpt.weights(), resolved.config, tp_rank=groups.tp.rank, tp=groups.tp.size)
        gpt.pack()
        return gpt
    source = open_checkpoint(resolved.path, resolved.config)
    with progress.reading(resolved.path.name) as on_bytes:
        load_weights(
            gpt.weights(),
            source,
            resolved.config,
            tp_rank=groups.tp.rank,
            tp=groups.tp.size,
            on_bytes=on_bytes,
        )
    gpt.pack()
    return gpt
