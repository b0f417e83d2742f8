"""The safetensors files of a Hugging Face folder that hold its weights, by transformers' rules.

model.safetensors comes before model.safetensors.index.json, whose `weight_map` is the authority on
where a tensor lies. Files beside them (consolidated, variants, adapters) are not read.
"""

from __future__ import annotations

import re
from pathlib import Path

from sps2_mega.checkpoint.huggingface.fields import weight_map
from sps2_mega.checkpoint.json_file import read_json, shown
from sps2_mega.errors import CheckpointError, ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Files to open, and the index's tensor name -> file name; None where no index decides.

    Raises:
        CheckpointError: none, or the index names files that are absent or outside the folder.
    """
    refuse_adapter(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    index = folder / INDEX
    if index.is_file():
        try:
            where = weight_map(read_json(index), str(index))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        names = sorted(set(where.values()))
        if outside := [name for name in names if Path(name).name != name or "\0" in name]:
            raise CheckpointError(f"{index} names files outside the folder: {shown(outside)}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(f"{index} names files that are absent: {shown(absent)}")
        return [folder / name for name in names], where
    return _without_index(folder), None


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that holds a LoRA or another adapter.

    Raises:
        CheckpointError: says how to merge it.
    """
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds an adapter ({_ADAPTER}), which is not applied: merge it into its base "
            "model (peft: merge_and_unload, then save_pretrained) and pass that folder"
        )


def _without_index(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    shards = [path for path in found if _SHARD.fullmatch(path.name)]
    if shards:
        total = int(shards[0].name[15:20])
        wanted = [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(len(shards))]
        if len(shards) == total and [path.name for path in shards] == wanted:
            return shards
        raise CheckpointError(f"{folder}: shards without {INDEX}, and not all of them are there")
    if found:
        names = ", ".join(path.name for path in found[:3])
        raise CheckpointError(
            f"{folder} has no {SINGLE} and no {INDEX}: {names} is not the name of a model's weights"
        )
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has {', '.join(pickled[:3])} only: pickled weights are not read, "
            "save the model as safetensors"
        )
    raise CheckpointError(f"{folder} has no .safetensors files")
