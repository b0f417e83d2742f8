"""Token ids of a request's prompt, given as text, messages, or the ids themselves."""

from __future__ import annotations

from sps2_mega.errors import RequestError
from sps2_mega.serving.protocol import ParsedRequest
from sps2_mega.text.tokenizer import Tokenizer


def prompt_tokens(request: ParsedRequest, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a request's prompt or messages.

    Raises:
        RequestError: text without a tokenizer, text that is not Unicode, or messages that the
            template refuses.
    """
    if isinstance(request.prompt, list):
        return request.prompt
    if request.messages is not None:
        return message_tokens(request.messages, tokenizer)
    return text_tokens(request.prompt or "", tokenizer)


def text_tokens(
    text: str, tokenizer: Tokenizer | None, *, add_special_tokens: bool = True
) -> list[int]:
    try:
        return _needed(tokenizer).encode(text, add_special_tokens=add_special_tokens)
    except (UnicodeEncodeError, TypeError):  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise RequestError(_NOT_UNICODE) from None


def message_tokens(messages: list[dict[str, str]], tokenizer: Tokenizer | None) -> list[int]:
    try:
        return _needed(tokenizer).apply_chat_template(messages)
    except (UnicodeEncodeError, TypeError):
        raise RequestError(_NOT_UNICODE) from None


_NOT_UNICODE = "the text has characters that are not Unicode (lone surrogates)"


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise RequestError(
            "text needs a tokenizer, and the model has none: give token ids, or pass --tokenizer"
        )
    return tokenizer
