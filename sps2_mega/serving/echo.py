"""Echo of a prompt in front of its completions: its text and, if requested, its logprobs.

The shapes follow OpenAI's completions: lists over all tokens, prompt and output
together, in which the first token has no log-probability and `text_offset` counts
characters of the text including the echo.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import Any

from sps2_mega.errors import RequestError
from sps2_mega.logprobs import PromptLogprobs
from sps2_mega.serving.responses import TextOffsets, logprob_lists, token_text
from sps2_mega.text.tokenizer import Tokenizer

_MAX_NUMBERS = 2**21  # per answer: some 100 MB of JSON, and several times that while it is built


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """One prompt as its client gets it back; `tokenizer` is the model's."""

    text: str
    token_ids: list[int]
    tokenizer: Tokenizer | None

    def logprobs(self, prompt_logprobs: PromptLogprobs) -> dict[str, Any]:
        """Logprob lists of the prompt's tokens."""
        entries = [
            prompt_logprobs.entry(index, token_id)
            for index, token_id in enumerate(self.token_ids[1:])
        ]
        rest = logprob_lists(entries, self.tokenizer, TextOffsets(self.tokenizer))
        return {
            "tokens": [token_text(self.token_ids[0], self.tokenizer), *rest["tokens"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "top_logprobs": [None, *rest["top_logprobs"]],
            "text_offset": self._offsets(),
        }

    def output_offsets(self) -> TextOffsets:
        """Text offsets of the tokens of an output after the echo."""
        return TextOffsets(self.tokenizer, start=len(self.text))

    def _offsets(self) -> list[int]:
        """Start of each token in `text`, in characters.

        A token is as long as its text, or empty if it is not in the text at all, like the BOS
        before every prompt; some decoders drop the space of a first word.
        """
        if self.tokenizer is None:
            return [0] * len(self.token_ids)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        position, offsets = 0, []
        for token_id in self.token_ids:
            offsets.append(position)
            piece = decoder.decode(self.tokenizer.token_bytes(token_id))
            if self.text.startswith(piece, position):
                position += len(piece)
            elif token_id in self.tokenizer.special_ids:
                continue
            elif piece.startswith(" ") and self.text.startswith(piece[1:], position):
                position += len(piece) - 1
            else:
                position = min(position + len(piece), len(self.text))
        return offsets


def echo_of(prompt: str | list[int], token_ids: list[int], tokenizer: Tokenizer | None) -> Echo:
    """Echo of a prompt as its client wrote it.

    Raises:
        RequestError: the prompt is token ids, and there is no tokenizer to decode them.
    """
    if isinstance(prompt, str):
        return Echo(text=prompt, token_ids=token_ids, tokenizer=tokenizer)
    if tokenizer is None:
        raise RequestError("echo of token ids needs a tokenizer, and the model has none")
    known = [token_id for token_id in prompt if 0 <= token_id < 2**31]
    text = tokenizer.decode(known, skip_special_tokens=False)
    return Echo(text=text, token_ids=token_ids, tokenizer=tokenizer)


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Concatenate the lists of both bodies."""
    return {name: values + second[name] for name, values in first.items()}


def check_size(prompts: list[list[int]], *, num_samples: int, num_top: int) -> None:
    """Limit the size of an echo, which is built in one piece in the memory of the server.

    Raises:
        RequestError: with the numbers.
    """
    numbers = sum(map(len, prompts)) * num_samples * (1 + num_top)
    if numbers > _MAX_NUMBERS:
        raise RequestError(
            f"echo with logprobs {num_top} asks for {numbers:,} log-probabilities of prompt "
            "tokens; one request "
            f"may ask for {_MAX_NUMBERS:,}: lower logprobs or n, or send fewer tokens in a request"
        )
