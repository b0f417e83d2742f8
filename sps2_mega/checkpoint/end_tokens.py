"""End-of-text token ids of checkpoints that do not state them: Megatron stores no token ids.

The files beside the tokenizer have them: generation_config.json, config.json, or the name of the
end token in tokenizer_config.json, looked up among the added tokens of tokenizer.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sps2_mega.checkpoint.hf_config import read_json


def end_token_ids(folder: Path) -> tuple[int, ...]:
    """Token ids that end a text; empty if no file of the folder states them."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            stated = read_json(folder / name).get("eos_token_id")
            if stated is not None:
                return (stated,) if isinstance(stated, int) else tuple(stated)
    settings, vocabulary = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings.is_file() or not vocabulary.is_file():
        return ()
    end = read_json(settings).get("eos_token")
    # Old files store the token's settings.
    text = end.get("content") if isinstance(end, dict) else end
    added: list[dict[str, Any]] = read_json(vocabulary).get("added_tokens") or []
    return tuple(token["id"] for token in added if token.get("content") == text)[:1]
