"""Facts of a folder's tokenizer for `sps2 inspect` and `sps2 doctor`.

Both also say where transformers' AutoTokenizer would make other ids of a text than tokenizer.json
does. Serving never asks: importing transformers takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Size, end token and chat templates of the tokenizer in `folder`, as plain values.

    `differs` says how AutoTokenizer would differ, None where it does not.

    Raises:
        ConfigError: the tokenizer cannot be read.
    """
    from sps2_mega.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return {
        "folder": str(folder),
        "tokens": tokenizer.vocab_size,
        "end": list(tokenizer.eos_token_ids),
        "chat_templates": sorted(tokenizer.chat_templates),
        "differs": _difference(folder, tokenizer.backend),
    }


def tokenizer_line(facts: dict[str, Any]) -> str:
    """`259 tokens, end 257, chat template default (DIR)`."""
    ends = ", ".join(map(str, facts["end"])) or "not named"
    templates = ", ".join(facts["chat_templates"]) or "none"
    return f"{facts['tokens']} tokens, end {ends}, chat template {templates} ({facts['folder']})"


def _difference(folder: Path, backend: Any) -> str | None:
    from sps2_mega.text.tokenizer_files import TOKENIZER_FILE

    if not (folder / TOKENIZER_FILE).is_file():
        return None  # converted by transformers, so it is the same
    from sps2_mega.text.tokenizer_conversion import auto_tokenizer_difference

    return auto_tokenizer_difference(folder, backend)
