"""Text of a token list that grows, piece by piece, without ever showing half a character.

Two ways, chosen by how the tokenizer decodes:

    byte-level   a token is bytes; a UTF-8 decoder holds back the bytes of an unfinished character
    any other    a token's text may depend on the one before it: a short window is decoded twice,
                 without and with the new tokens, and the difference is new text

    window   [ context | pending ]      new text = decode(context + pending) - decode(context)

Both take a bounded amount of work per token. Stop strings are searched in `stop_strings`.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from sps2_mega.text.tokenizer import Tokenizer

# A decoder looks back a token or two (word marks, runs of byte tokens).
_CONTEXT_TOKENS = 6
# Tokens without text, such as word marks, that may be pending.
_MAX_SILENT = 4


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """Text that became final with this token, often one token late; may be empty."""

    def finish(self) -> str:
        """Text that was held back; an unfinished character becomes U+FFFD."""


def detokenizer(tokenizer: Tokenizer, prompt_token_ids: list[int]) -> Detokenizer:
    """Detokenizer for output that continues a prompt; special tokens have no text."""
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer)
    return WindowDetokenizer(tokenizer, prompt_token_ids)


def output_text(
    tokenizer: Tokenizer, prompt_token_ids: list[int], output_token_ids: list[int]
) -> str:
    """Text that the whole output adds to the text of the prompt."""
    if tokenizer.is_byte_level:
        return tokenizer.decode(output_token_ids)
    context = _prompt_context(tokenizer, prompt_token_ids)
    before = tokenizer.decode(context)
    after = tokenizer.decode(context + output_token_ids)
    # A prompt that ends inside a character changes when the output completes it.
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(output_token_ids)


class ByteDetokenizer:
    """Holds at most the 3 bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """`pending` has no text yet; `context` is the group of tokens before it, which ends with a
    whole character."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = _prompt_context(tokenizer, prompt_token_ids)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        # Without text there may be a word mark that shows only with the next token.
        if self._is_unfinished() or (not text and len(self._pending) < _MAX_SILENT):
            return ""
        self._advance(text)
        return text

    def finish(self) -> str:
        text = self._new_text() if self._pending else ""
        self._advance(text)
        return text

    def _is_unfinished(self) -> bool:
        """Whether the pending tokens end inside a character, of which they hold at most 3 bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(map(self._tokenizer.token_bytes, self._pending)))
        return bool(decoder.getstate()[0])

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        after = self._tokenizer.decode(self._context + self._pending)
        # A run of byte tokens that becomes invalid changes its own past; text given out stays.
        return (
            after[len(before) :]
            if after.startswith(before)
            else self._tokenizer.decode(self._pending)
        )

    def _advance(self, text: str) -> None:
        # Cutting elsewhere than between groups could cut a character of several byte tokens.
        silent = (self._context + self._pending)[-2 * _CONTEXT_TOKENS :]
        self._context = self._pending if text else silent
        self._pending = []


def _prompt_context(tokenizer: Tokenizer, prompt_token_ids: list[int]) -> list[int]:
    """Last tokens of the prompt, from the start of a character on."""
    context = prompt_token_ids[-_CONTEXT_TOKENS:]
    start = 0
    while start < len(context) and tokenizer.token_bytes(context[start])[:1] in _CONTINUATION_BYTES:
        start += 1
    return context[start:]


_CONTINUATION_BYTES = frozenset(bytes([byte]) for byte in range(0x80, 0xC0))
