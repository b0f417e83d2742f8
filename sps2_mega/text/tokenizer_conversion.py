"""Tokenizers that only transformers can read or build: the one place that imports it for them.

SentencePiece and tiktoken files and vocab.json become a tokenizer of the `tokenizers` library, as
transformers converts them. Importing transformers takes seconds, so only folders without a
tokenizer.json come here, and the commands that compare (`auto_tokenizer_difference`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers

from sps2_mega.errors import ConfigError

# File -> the modules that transformers reads it with, and the packages that bring them.
_SENTENCEPIECE = (("sentencepiece", "google.protobuf"), "sentencepiece protobuf")
_TIKTOKEN = (("tiktoken",), "tiktoken")
# Files that name a tokenizer's class, or the family that implies one.
_CLASS_FILES = ("tokenizer_config.json", "config.json")
# Texts on which two tokenizers of one folder are compared: blanks, digits, scripts, line ends.
PROBES = (
    "Hello world",
    " leading and  double blanks, trailing ",
    "x = 12345 * 6.7e-8;\n\n\tif (a!=b) {return 'c';}\r\n",
    "Größe naïve Ａｂｃ ﬁne e\u0301 \u00a0 你好，世界 😀👩‍💻 नमस्ते مرحبا",
    "don't I'LL we've\n\n\n   end",
)
_MOST_ADDED = 64  # added tokens that are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTokenizer:
    """What transformers made of a folder."""

    backend: tokenizers.Tokenizer
    named: dict[str, str]
    templates: dict[str, str]
    cleans_spaces: bool


def convert_tokenizer(folder: Path) -> ConvertedTokenizer:
    """Let transformers convert a folder without tokenizer.json.

    Raises:
        ConfigError: a package is absent, or transformers cannot read the folder either.
    """
    _check_packages(folder)
    bare = not any((folder / name).is_file() for name in _CLASS_FILES)
    if bare and (folder / "tokenizer.model").is_file() and not _is_tiktoken(folder):
        made = _as_sentencepiece_does(folder)
    else:
        made = _auto_tokenizer(folder)
    backend = getattr(made, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ConfigError(
            f"{folder} has no tokenizer.json, and transformers runs its {type(made).__name__} "
            "without the tokenizers library: a tokenizer.json is needed"
        )
    template = made.chat_template
    return ConvertedTokenizer(
        backend=backend,
        named=dict(made.special_tokens_map),
        templates={"default": template} if isinstance(template, str) else dict(template or {}),
        cleans_spaces=bool(made.clean_up_tokenization_spaces),
    )


def auto_tokenizer_difference(folder: Path, ours: tokenizers.Tokenizer) -> str | None:
    """How transformers' AutoTokenizer differs from a folder's tokenizer.json; None where it agrees.

    AutoTokenizer rebuilds the rules of some classes from their names, and then tokenizer.json's
    normalizer and splitting do not count; for family qwen2 it does so whatever class is named. A
    folder that it cannot open differs too.
    """
    try:
        made = _auto_tokenizer(folder)
    except ConfigError as error:
        return f"AutoTokenizer cannot open it: {error}"
    name = f"AutoTokenizer ({type(made).__name__})"
    added = [token.content for token in ours.get_added_tokens_decoder().values()]
    for text in (*PROBES, "".join(f"a{token} b" for token in added[:_MOST_ADDED])):
        own = ours.encode(text, add_special_tokens=False).ids
        try:
            theirs = list(made.encode(text, add_special_tokens=False))
        except Exception as error:  # noqa: BLE001 (the library raises plain Exception)
            return f"{name} cannot encode {text[:24]!r}: {error}"
        if theirs != own:
            return (
                f"{name} makes other ids of {text[:24]!r} ({len(theirs)} instead of {len(own)}): "
                "it rebuilds the rules of this class, but tokenizer.json counts here"
            )
        if list(made.encode(text)) != ours.encode(text).ids:
            return f"{name} puts other special tokens around a text than tokenizer.json"
    if made.get_vocab() != ours.get_vocab(with_added_tokens=True):
        return f"{name} has another vocabulary ({len(made)} tokens) than tokenizer.json"
    return None


def _auto_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder: of the class that it names, or the generic one."""
    named = any((folder / name).is_file() for name in _CLASS_FILES)
    return _opened_as("AutoTokenizer" if named else "PreTrainedTokenizerFast", folder)


def _as_sentencepiece_does(folder: Path) -> Any:
    """The conversion of a lone SentencePiece model, which must make the ids that the model makes.

    No file names a class, and transformers' generic one puts no blank before a text, as most
    models are trained with.
    """
    import sentencepiece

    path = folder / "tokenizer.model"
    made = _opened_as("PreTrainedTokenizerFast", folder)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for change in (None, _put_blank_before_text):
        if change is not None:
            change(made.backend_tokenizer)
        if all(made.encode(text, add_special_tokens=False) == own.encode(text) for text in PROBES):
            return made
    raise ConfigError(
        f"{path}: converted by transformers it makes other ids than SentencePiece itself: name the "
        "tokenizer_class in a tokenizer_config.json beside it, or save a tokenizer.json once"
    )


def _put_blank_before_text(backend: tokenizers.Tokenizer) -> None:
    steps = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Prepend("\u2581")])
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])


def _opened_as(kind: str, folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{folder} needs transformers to be converted: {error}") from None
    try:
        with _quiet():
            return getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # noqa: BLE001 (whatever its many readers raise)
        text = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{folder}: transformers cannot read its tokenizer: {type(error).__name__}: {text}"
        ) from None


def _check_packages(folder: Path) -> None:
    """Refuse what transformers would need an absent package for."""
    if (folder / "tekken.json").is_file():
        return
    if (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        modules, packages = _TIKTOKEN if _is_tiktoken(folder) else _SENTENCEPIECE
    elif (folder / "tiktoken.model").is_file():
        path = folder / "tiktoken.model"
        modules, packages = _TIKTOKEN
    elif any((folder / name).is_file() for name in _CLASS_FILES):
        return
    else:
        raise ConfigError(
            f"{folder} has vocab.json but no tokenizer.json, and the rules around a vocabulary are "
            "those of a class: name the tokenizer_class in a tokenizer_config.json beside it"
        )
    if any(not _is_installed(module) for module in modules):
        raise ConfigError(
            f"{path} is converted by transformers, which needs packages that are not installed: "
            f"pip install {packages}, or sps2_mega[tokenizers], or pass a folder with "
            "tokenizer.json by --tokenizer"
        )


def _is_tiktoken(folder: Path) -> bool:
    """Whether tokenizer.model is tiktoken's: lines of a token in base64 and its rank."""
    with (folder / "tokenizer.model").open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\s*", file.readline(400)) is not None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around a dotted name
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own warnings: what matters is in the error."""
    log = logging.getLogger("transformers")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
