"""Text to tokens and back, by the rules of a model folder's tokenizer.json.

Uses the `tokenizers` library directly: importing transformers would cost seconds in every rank.
Decides which ids are special and which bytes a token stands for; `tokenizer_files` reads folders,
`detokenizer` makes text incrementally, `chat_template` renders messages.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from sps2_mega.text.chat_template import (
    PLAIN_TEMPLATE,
    ChatTemplate,
    choose_template,
    compile_template,
)
from sps2_mega.text.tokenizer_files import load_tokenizer_parts

logger = logging.getLogger(__name__)


class Tokenizer:
    """Vocabulary of one model. Never truncates and never pads, whatever tokenizer.json says."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        self.vocab_size: int = (
            max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )
        # Byte-level tokenizers concatenate bytes; any other decoder may look at neighbouring
        # tokens.
        self.is_byte_level = _decodes_bytes(backend)
        self._bytes: dict[int, bytes] = {}
        # Tokens that decoding leaves out; not all that are called special, where a normalizer
        # changes how they are written.
        self.special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special and not backend.decode([token_id], skip_special_tokens=True)
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder's tokenizer: tokenizer.json and the files beside it, or what can be
        converted.

        Raises:
            ConfigError: there is none, or it cannot be read; says what to do.
        """
        parts = load_tokenizer_parts(Path(folder))
        return cls(parts.backend, special_tokens=parts.named, chat_templates=parts.templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens of plain text (e.g. BOS)."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Prompt ids that request the next assistant message.

        A model without a template gets `role: content` lines after its usual special tokens.

        Raises:
            RequestError: the template refuses the messages, or none is meant for them.
        """
        template = self._template(with_tools=tools is not None)
        text = template.render(messages, tools=tools)
        # A model's own template writes BOS itself where the model wants one.
        return self.encode(text, add_special_tokens=not self.has_chat_template)

    @property
    def base_vocab_size(self) -> int:
        """One more than the last id of the model proper, before any token was added to it."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=False)
        return max(vocabulary.values(), default=-1) + 1

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-text id that the tokenizer names; a model's configuration may add others."""
        token_id = self._special_id("eos_token")
        return () if token_id is None else (token_id,)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, to compare with others; not to be changed."""
        return self._backend

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written so; None if there is none."""
        found: int | None = self._backend.token_to_id(text)
        return found

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

    def _template(self, *, with_tools: bool) -> ChatTemplate:
        templates = self.chat_templates or {"default": PLAIN_TEMPLATE}
        name = choose_template(templates, with_tools=with_tools)
        if name not in self._compiled:
            if not self.has_chat_template:
                logger.info(
                    "the model has no chat template: messages are written as plain "
                    "'role: content' lines"
                )
            self._compiled[name] = compile_template(templates[name], self.special_tokens)
        return self._compiled[name]

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)


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
