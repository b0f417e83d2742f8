"""Text to tokens and back, from a model folder's tokenizer.json, as its own library does it.

Uses the `tokenizers` library directly: importing transformers would cost seconds in every rank.
Decides which ids are special and which bytes a token stands for; `detokenizer` makes text
incrementally, `chat_template` renders messages.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from sps2_mega.errors import ConfigError
from sps2_mega.text.chat_template import PLAIN_TEMPLATE, compile_template, find_template

logger = logging.getLogger(__name__)

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Vocabulary of one model. Never truncates and never pads, whatever tokenizer.json says."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.has_chat_template = chat_template is not None
        self._chat_template_text = PLAIN_TEMPLATE if chat_template is None else chat_template
        self.vocab_size: int = (
            max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )
        # Byte-level tokenizers concatenate bytes; any other decoder may look at neighbouring
        # tokens.
        self.is_byte_level = _decodes_bytes(backend)
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json and its companions from `folder`.

        Raises:
            ConfigError: there is no tokenizer.json, or it cannot be read; says what to do.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(_missing_text(folder))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path} is not a tokenizer file: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = {**_special(_read_json(folder / "special_tokens_map.json")), **_special(config)}
        return cls(backend, special_tokens=special, chat_template=find_template(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens of plain text (e.g. BOS)."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]:
        """Prompt ids that request the next assistant message.

        A model without a template gets `role: content` lines after its usual special tokens.

        Raises:
            RequestError: the template refuses the messages.
        """
        text = self._chat_template.render(messages)
        # A model's own template writes BOS itself where the model wants one.
        return self.encode(text, add_special_tokens=not self.has_chat_template)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-text id that the tokenizer names; a model's configuration may add others."""
        token_id = self._special_id("eos_token")
        return () if token_id is None else (token_id,)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for by itself; empty for ids outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token with characters outside the byte alphabet
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        if token_id in self.special_ids:
            return token.encode()
        # A SentencePiece word mark is a space; decoding alone would strip it at the start of a
        # text.
        return (
            token.replace("\u2581", " ").encode()
            if "\u2581" in token
            else self.decode([token_id]).encode()
        )

    @functools.cached_property
    def _chat_template(self) -> Any:
        if not self.has_chat_template:
            logger.info(
                "the model has no chat template: messages are written as plain 'role: content' "
                "lines"
            )
        return compile_template(self._chat_template_text, self.special_tokens)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _decodes_bytes(backend: tokenizers.Tokenizer) -> bool:
    if backend.decoder is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    steps = state.get("decoders", []) if state.get("type") == "Sequence" else [state]
    return [step.get("type") for step in steps] == ["ByteLevel"]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    shifted = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_BYTE_OF_CHARACTER = _byte_alphabet()


def _special(config: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _missing_text(folder: Path) -> str:
    if not folder.is_dir():
        return f"tokenizer folder {folder} does not exist"
    sources = [
        name
        for name in ("tokenizer.model", "spiece.model", "vocab.json")
        if (folder / name).is_file()
    ]
    if not sources:
        return (
            f"{folder} has no tokenizer.json; pass a folder that has one with --tokenizer "
            "(a Megatron checkpoint does not hold its tokenizer)"
        )
    return (
        f"{folder} has {', '.join(sources)} but no tokenizer.json; convert it once with "
        "transformers: "
        f'python -c "from transformers import AutoTokenizer; '
        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
