"""Part of a growing text that may be shown: whole characters, and no beginning of a stop string.

    x = 1 ; y = 2 ; en            stop: "; end"
    |-- shown ---|--|
                  held back until the next token says whether this is the stop string

The final text is made in `output_processor`; what was shown is always a beginning of it.
"""

from __future__ import annotations

from sps2_mega.text.detokenizer import detokenizer
from sps2_mega.text.tokenizer import Tokenizer


class TextStream:
    """Everything shown of one sequence, in order, makes its text; each token is reported once."""

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: list[int], stop: tuple[str, ...]
    ) -> None:
        self._detokenizer = detokenizer(tokenizer, prompt_token_ids) if tokenizer else None
        self._stop = stop
        self._shown = 0  # characters
        self._held = ""
        self._num_tokens = 0

    def push(self, token_id: int) -> str:
        """Text that may be shown after one more token; often empty."""
        if self._detokenizer is None:
            return ""
        text = self._held + self._detokenizer.push(token_id)
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._shown += len(shown)
        return shown

    def rest(self, final_text: str) -> str:
        """Text left to show of the finished sequence."""
        return final_text[self._shown :]

    def new_tokens(self, num_tokens: int) -> slice:
        """Slice of `num_tokens` output tokens that was not reported yet."""
        first, self._num_tokens = self._num_tokens, num_tokens
        return slice(first, num_tokens)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
