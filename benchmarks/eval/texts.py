"""Held-out texts, and windows of tokens cut from them.

Decides what counts as a text: a file, or a JSON line's string field. Nothing is downloaded. Without
data of the user's own they are the files of Python's library that the bundled model was not trained
on.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json")
FIELDS = ("text", "content", "prompt")
TRAINING = Path(__file__).resolve().parents[1] / "train" / "sps2-tiny.yaml"
_CHOICE = 20  # windows to draw one from

Texts = dict[str, bytes]


def load_texts(data: Path | None) -> Texts:
    """Texts by name, in order.

    Raises:
        ConfigError: there is nothing to read, or a JSON line has no text.
    """
    if data is None:
        return _held_out_library()
    if data.is_dir():
        files = [f for f in sorted(data.rglob("*")) if f.is_file() and f.suffix in SUFFIXES]
        if not files:
            raise ConfigError(f"--data {data}: no file ends with {', '.join(SUFFIXES)}")
    elif data.is_file():
        files = [data]
    else:
        raise ConfigError(f"--data {data}: no such file or folder")
    texts: Texts = {}
    for file in files:
        texts |= _json_lines(file) if file.suffix == ".jsonl" else {str(file): file.read_bytes()}
    return {name: text for name, text in texts.items() if text}


def windows(
    texts: Texts, tokenizer: Tokenizer, *, length: int, count: int, seed: int
) -> list[list[int]]:
    """Token lists of exactly `length` (with the tokenizer's BOS, if any), each from one text.

    They are drawn by `seed` from anywhere in the texts, since beginnings are not like the rest; no
    token is in two of them. Texts are read until there is a choice, not all of a large collection.

    Raises:
        ConfigError: there are fewer than `count` windows.
    """
    prefix = bos_prefix(tokenizer)
    room = length - len(prefix)
    if room < 2:
        raise ConfigError(f"a length of {length} tokens leaves nothing to predict")
    rng = np.random.default_rng([seed, length])
    names = list(texts)
    found: list[list[int]] = []
    for index in rng.permutation(len(names)):
        text = texts[names[index]].decode("utf-8", errors="replace")
        tokens = tokenizer.encode(text, add_special_tokens=False)
        offset = int(rng.integers(len(tokens) % room + 1))
        found += [
            prefix + tokens[start : start + room]
            for start in range(offset, len(tokens) - room + 1, room)
        ]
        if len(found) >= _CHOICE * count:
            break
    if len(found) < count:
        raise ConfigError(
            f"{count} texts of {length} tokens are needed, the data has {len(found)}: "
            "give more data, shorter lengths or fewer texts"
        )
    return [found[index] for index in rng.permutation(len(found))[:count]]


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """Tokens that the tokenizer puts before plain text: [BOS] or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []


def _held_out_library() -> Texts:
    from benchmarks.train.config import load_train_config
    from benchmarks.train.corpus import read_corpus

    corpus = read_corpus(load_train_config(TRAINING, "cpu").corpus)
    return {name: text.tobytes() for name, text in corpus.held_out.items()}


def _json_lines(file: Path) -> Texts:
    texts = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: not JSON: {error}") from error
            found = record if isinstance(record, str) else None
            if isinstance(record, dict):
                found = next((record[f] for f in FIELDS if isinstance(record.get(f), str)), None)
            if found is None:
                raise ConfigError(f"{file}:{number}: needs a string in one of {', '.join(FIELDS)}")
            texts[f"{file}:{number}"] = found.encode()
    return texts
