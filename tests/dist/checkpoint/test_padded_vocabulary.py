"""Rows of a Megatron checkpoint that only pad its vocabulary are in no sample and no score."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizer_samples as samples
from engine_run import assert_same, run_engine
from unit.checkpoint.checkpoints import LLAMA, MemorySource, write_megatron

from sps2_mega.checkpoint.export import export_huggingface
from sps2_mega.checkpoint.megatron.vocabulary import Vocabulary, vocabulary_of_run
from sps2_mega.errors import Refusal
from sps2_mega.types import FinishReason

TOKENS, ROWS, END = 259, 384, 257
CONFIG = replace(
    LLAMA,
    vocab_size=TOKENS,
    num_kv_heads=6,
    ffn_hidden_size=42,
    dtype="float32",
    max_position_embeddings=512,
)
REQUESTS = [
    ([1, 2, END, 3, 258], dict(max_tokens=0, temperature=0.0, prompt_logprobs=3)),
    ([5, 6], dict(max_tokens=40, seed=1, n=8, logprobs=3)),
    ([7], dict(max_tokens=6, temperature=0.0, logprobs=2)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same weights as a Hugging Face folder, and as Megatron's converter writes them: padding
    rows equal to the last one, and no `vocab_size`."""
    base = tmp_path_factory.mktemp("padded")
    hf = base / "hf"
    export_huggingface(MemorySource(CONFIG), hf)
    samples.save(samples.byte_level(), hf)
    args = {"vocab_size": None, "tokenizer_type": "HuggingFaceTokenizer"}
    megatron = write_megatron(base / "megatron", CONFIG, rows=ROWS, args=args)
    samples.save(samples.byte_level(), megatron / "release" / "tokenizer")
    return hf, megatron


@pytest.mark.parametrize("tp", [1, 2])
def test_samples_and_scores_are_those_of_the_hugging_face_folder(
    folders: tuple[Path, Path], tp: int
) -> None:
    hf, megatron = (dict(model=str(folder), dtype="float32") for folder in folders)
    expected = run_engine(hf, REQUESTS)
    outputs = run_engine(megatron, [*REQUESTS, ([TOKENS], dict(max_tokens=1))], tp=tp)
    assert_same(outputs[:-1], expected)
    assert outputs[-1] is Refusal.TOKEN_OUT_OF_RANGE
    sampled = outputs[1].completions
    assert all(token < TOKENS for one in sampled for token in one.token_ids)
    # The last row's copies would have taken almost all of its probability.
    assert any(one.finish_reason is FinishReason.STOP for one in sampled)
    assert all((END in one.token_ids) == (one.token_ids[-1] == END) for one in sampled)


def test_null_tokenizers_count_as_in_the_installed_megatron_core() -> None:
    """Of 0.18 and later releases the end of document is one of the tokens, not one more."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    theirs = NullTokenizer(249)
    args = {"tokenizer_type": "NullTokenizer", "vocab_size": 249}
    if "eod_id" in inspect.signature(NullTokenizer).parameters:
        args["null_tokenizer_eod_id"] = None
    assert vocabulary_of_run(args, None, "args") == Vocabulary(theirs.vocab_size, (theirs.eod,))
