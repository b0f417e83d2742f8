from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import tokenizer_samples as samples

from sps2_mega.text.detokenizer import detokenizer, output_text
from sps2_mega.text.tokenizer import Tokenizer

TEXTS = [
    "plain ascii, then Größe über alles",
    "你好，世界 😀😀👩‍💻 naïve",
    "  leading spaces\n\tand lines \n",
    "é",
]
KINDS = {
    "byte_level": samples.byte_level,
    "byte_bpe": samples.byte_bpe,
    "sentencepiece": samples.sentencepiece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return Tokenizer.load(
        samples.save(KINDS[request.param](), tmp_path_factory.mktemp(request.param))
    )


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    growing = detokenizer(tokenizer, prompt)
    return [*map(growing.push, ids), growing.finish()]


def test_pieces_add_up_to_the_whole_text(tokenizer: Tokenizer) -> None:
    for prompt_text in ("", "prompt", "ends in 你"):
        prompt = tokenizer.encode(prompt_text)
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert "".join(pieces(tokenizer, prompt, ids)) == output_text(tokenizer, prompt, ids)


def test_no_piece_has_half_a_character(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for piece in pieces(tokenizer, [], ids):
            assert "\ufffd" not in piece


def test_every_split_into_prompt_and_output_keeps_the_text(tokenizer: Tokenizer) -> None:
    text = "the 你 quick 😀 fox"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if "\ufffd" in before:
            continue  # a prompt that ends inside a character
        growing = "".join(pieces(tokenizer, ids[:cut], ids[cut:]))
        assert before + growing == tokenizer.decode(ids)
        assert growing == output_text(tokenizer, ids[:cut], ids[cut:])


def test_text_cut_inside_a_character_ends_with_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab😀", add_special_tokens=False)
    got = pieces(tokenizer, [], ids[:-1])
    assert "".join(got[:-1]).lstrip() == "ab"
    assert set(got[-1]) == {"\ufffd"}


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_ids[0]
    ids = tokenizer.encode("a b", add_special_tokens=False)
    mixed = [eos, ids[0], eos, *ids[1:], eos]
    assert "".join(pieces(tokenizer, [], mixed)) == tokenizer.decode(ids)


def test_random_bytes_equal_one_decode(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path))
    byte_ids = {tokenizer.token_bytes(index): index for index in range(256)}
    rng = random.Random(3)
    for _ in range(300):
        raw = bytes(
            rng.choice([0x41, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC3, 0xED])
            for _ in range(9)
        )
        ids = [byte_ids[bytes([byte])] for byte in raw]
        assert "".join(pieces(tokenizer, [], ids)) == tokenizer.decode(ids), raw


def test_endless_damage_still_comes_out(tokenizer: Tokenizer) -> None:
    broken = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xff")
    growing = detokenizer(tokenizer, [])
    for count in range(1, 200):
        growing.push(broken)
        if count == 100:
            start = time.perf_counter()
    assert "\ufffd" in growing.push(broken) + growing.push(broken) + growing.push(
        broken
    ) + growing.push(broken)
    assert time.perf_counter() - start < 0.5


def test_cost_per_token_does_not_grow(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick 你 brown fox\n" * 400, add_special_tokens=False)
    growing = detokenizer(tokenizer, [])
    start = time.perf_counter()
    for token_id in ids:
        growing.push(token_id)
    assert (time.perf_counter() - start) / len(ids) < 100e-6


@pytest.mark.parametrize("kind", [*KINDS.values(), samples.unigram, samples.word_level])
def test_added_tokens_show_in_a_stream_as_in_the_whole_text(tmp_path: Path, kind) -> None:
    """Special ones, ordinary ones, and ones that a normalizer or the byte alphabet rewrites."""
    backend = kind()
    texts = ["<|im_end|>", " é", "Ġx", "né", "<tool>", "\u2581w", "x y ", "😀"]
    new = [text for text in texts if backend.token_to_id(text) is None]
    added = {
        str(backend.get_vocab_size() + i): {
            "content": text,
            "special": i % 3 == 0,
            "normalized": i % 2 == 0,
        }
        for i, text in enumerate(new)
    }
    tokenizer = Tokenizer.load(samples.save(backend, tmp_path, added_tokens_decoder=added))
    rng = random.Random(3)
    for _ in range(60):
        prompt = tokenizer.encode(rng.choice(samples.CORPUS), add_special_tokens=False)
        answer = "".join(rng.choice([*texts, "a ", " b", "é", "你"]) for _ in range(12))
        ids = tokenizer.encode(answer, add_special_tokens=False)
        streamed = "".join(pieces(tokenizer, prompt, ids))
        assert streamed == output_text(tokenizer, prompt, ids)
