"""Search for stop strings in text that grows token by token.

Only sequences that have stop strings are searched. What a finished sequence's text is without them
is decided in `output_processor`.
"""

from __future__ import annotations

from sps2_mega.text.detokenizer import Detokenizer
from sps2_mega.types import SamplingParams


class StopSearch:
    """Searches the text of one growing sequence; keeps no more tail than a stop string can span."""

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stop = params.stop
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._keep = max(len(text) for text in params.stop) - 1
        self._pieces: list[str] = []
        self._tail = ""
        self.found: str | None = None  # the output's text, once a stop string ended it

    def push(self, token_id: int, num_tokens: int) -> bool:
        """Add output token number `num_tokens` (from 1); True when a stop string is complete."""
        piece = self._detokenizer.push(token_id)
        if not piece or self.found is not None:
            return self.found is not None
        self._pieces.append(piece)
        if num_tokens < self._min_tokens:
            # Text of the first min_tokens tokens cannot stop, nor can a string that begins in it.
            return False
        window = self._tail + piece
        hits = [(start, text) for text in self._stop if (start := window.find(text)) >= 0]
        if not hits:
            self._tail = window[-self._keep :] if self._keep else ""
            return False
        start, text = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
        end = start + len(text) if self._include else start
        full = "".join(self._pieces)
        self.found = full[: len(full) - len(window) + end]
        return True
