"""Architecture that a user gives beside a checkpoint, in place of the one that its folder states.

It is a name in model_configs/ or a file: YAML as those of model_configs/, or a config.json of
Hugging Face. Only the architecture of a file counts; its folders and suggestions do not.
"""

from __future__ import annotations

from pathlib import Path

from sps2_mega.checkpoint.huggingface.config import model_config_from_hf
from sps2_mega.checkpoint.json_file import read_json
from sps2_mega.checkpoint.model_file import model_files, read_model_file
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

_YAML = (".yaml", ".yml")


def given_config(name_or_file: str | Path) -> ModelConfig:
    """Architecture of a name in model_configs/, or of a file; a file of that path comes first.

    Raises:
        ConfigError: neither, an unreadable file, or one with a field that is unknown or wrong; the
            message names --config.
    """
    path = Path(name_or_file)
    try:
        if path.is_file() and path.suffix == ".json":
            return _config_json(path)
        if path.is_file():
            return read_model_file(path).config
        return read_model_file(_named(path)).config
    except ConfigError as error:
        raise ConfigError(f"--config {name_or_file}: {error}") from None


def _named(given: Path) -> Path:
    files = model_files()
    if str(given) in files:
        return files[str(given)]
    if given.is_dir():
        raise ConfigError("it is a folder: a file is needed, as the config.json in a folder")
    if given.suffix in (*_YAML, ".json") or len(given.parts) > 1:
        raise ConfigError("there is no such file")
    raise ConfigError(
        f"it is no file, and no name in model_configs/ ({', '.join(sorted(files)) or 'none found'})"
    )


def _config_json(path: Path) -> ModelConfig:
    content = read_json(path)
    try:
        return model_config_from_hf(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
