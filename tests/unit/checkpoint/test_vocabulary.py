"""How many tokens a checkpoint has and which of them end a text, whoever says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizer_samples as samples
import torch
from unit.checkpoint.checkpoints import LLAMA, MemorySource, write_megatron

from sps2_mega.checkpoint.canonical import WORD_EMBEDDINGS
from sps2_mega.checkpoint.export import export_huggingface
from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.megatron.vocabulary import Vocabulary, vocabulary_of_run
from sps2_mega.checkpoint.resolve import resolve_model
from sps2_mega.checkpoint.sharding import local_shapes
from sps2_mega.checkpoint.source import open_checkpoint, tokenizer_folder
from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError

TOKENS = 259  # of `samples.byte_level`, whose end token is 257


def bytes_model(vocab_size: int = TOKENS) -> ModelConfig:
    sizes = dict(vocab_size=vocab_size, num_kv_heads=6, ffn_hidden_size=42)
    return replace(LLAMA, **sizes, dtype="float32")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples.save(samples.byte_level(), tmp_path_factory.mktemp("tokens"))


NULL, EOD = {"tokenizer_type": "NullTokenizer"}, {"null_tokenizer_eod_id": None}


@pytest.mark.parametrize(
    ("args", "with_tokenizer", "expected"),
    [
        (NULL | {"vocab_size": 249}, False, Vocabulary(250, (249,))),
        (NULL | {"vocab_size": 249}, True, Vocabulary(250, (249,))),
        (NULL | EOD | {"vocab_size": 249}, False, Vocabulary(249, (248,))),
        (
            NULL | {"vocab_size": 249, "null_tokenizer_eod_id": 3},
            False,
            Vocabulary(249, (3,)),
        ),
        (
            EOD | {"tokenizer_type": "NullMultimodalTokenizer", "vocab_size": 249},
            False,
            Vocabulary(250, (249,)),
        ),
        ({"tokenizer_type": "TikTokenizer"}, True, Vocabulary(2**17)),
        ({"tokenizer_type": "TikTokenizer", "vocab_size": 1000}, False, Vocabulary(1000)),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, True, Vocabulary(TOKENS)),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": 257},
            True,
            Vocabulary(TOKENS),
        ),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": 257},
            False,
            Vocabulary(257),
        ),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "special_tokens": ["<s>"]},
            True,
            Vocabulary(TOKENS),
        ),
        ({"vocab_size": 300}, True, Vocabulary(300)),  # Bridge: the model's own number
        ({"padded_vocab_size": 384}, True, Vocabulary(TOKENS)),
    ],
)
def test_the_number_of_tokens_follows_the_kind_of_tokenizer(
    tokens: Path, args: Mapping[str, Any], with_tokenizer: bool, expected: Vocabulary
) -> None:
    given = {"padded_vocab_size": 2**18, **args}
    assert vocabulary_of_run(given, tokens if with_tokenizer else None, "here") == expected


@pytest.mark.parametrize(
    ("args", "with_tokenizer", "message"),
    [
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "padded_vocab_size": 384},
            False,
            r"here: vocab_size is not stated, only padded_vocab_size=384.*--tokenizer DIR",
        ),
        (NULL | {"padded_vocab_size": 384}, False, "vocab_size is not stated"),
        ({"vocab_size": "249"}, False, "vocab_size must be an integer >= 1, found '249'"),
        ({"vocab_size": True}, False, "found True"),
        ({"vocab_size": 0}, False, "found 0"),
        (
            NULL | {"vocab_size": 9, "null_tokenizer_eod_id": 9},
            False,
            "null_tokenizer_eod_id=9: an id below vocab_size=9",
        ),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_special_tokens": ["<s>", "<x>"]},
            True,
            "tokenizer_special_tokens adds '<x>', which the tokenizer in .* lacks",
        ),
    ],
)
def test_an_unknown_number_of_tokens_is_refused(
    tokens: Path, args: Mapping[str, Any], with_tokenizer: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        vocabulary_of_run(args, tokens if with_tokenizer else None, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_padding_rows_reach_no_rank(tmp_path: Path, tokens: Path, tp: int) -> None:
    """Rows of a Megatron file beyond the tokenizer, here copies of the last one, are left out."""
    config = bytes_model()
    folder = write_megatron(tmp_path, config, rows=384, args={"vocab_size": None})
    source = open_checkpoint(folder, tokens=tokens)
    assert source.config.vocab_size == TOKENS and source.shapes()[WORD_EMBEDDINGS][0] == 384
    rows = []
    for rank in range(tp):
        parameters = {n: torch.full(s, torch.nan) for n, s in local_shapes(config, tp).items()}
        load_weights(parameters, source, source.config, tp_rank=rank, tp=tp)
        rows.append(parameters["output_layer.weight"])
    joined = torch.cat(rows)
    assert torch.equal(joined[:TOKENS], MemorySource(config).weights["output_layer.weight"])
    assert not joined[TOKENS:].any()


def test_a_tokenizer_beyond_the_rows_is_refused(tmp_path: Path, tokens: Path) -> None:
    small = bytes_model(256)
    folder = write_megatron(tmp_path / "m", small, rows=256, args={"vocab_size": None})
    with pytest.raises(ConfigError, match=r"tokenizer has 259 tokens, but the model has rows for"):
        resolve_model(folder, tokenizer=tokens)
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 199}
    folder = write_megatron(tmp_path / "n", bytes_model(200), rows=384, args=null)
    with pytest.raises(ConfigError, match=r"tokenizer has 256 tokens, .* rows for 200"):
        resolve_model(folder, tokenizer=tokens)
    tiny = bytes_model(200)
    export_huggingface(MemorySource(tiny), tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"tokenizer has 256 tokens, .* rows for 200"):
        resolve_model(tmp_path / "hf", tokenizer=tokens)


def test_added_tokens_without_a_row_are_a_warning_in_hugging_face_folders(
    tmp_path: Path, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers opens such folders too: a padding token that nobody gave a row, say."""
    export_huggingface(MemorySource(bytes_model(257)), tmp_path)
    model = resolve_model(tmp_path, tokenizer=tokens)
    assert "added tokens up to id 258 have no row in a model of 257 tokens" in caplog.text
    assert (model.config.vocab_size, model.config.eos_token_ids) == (257, ())


def test_rows_of_a_hugging_face_folder_are_tokens(tmp_path: Path, tokens: Path) -> None:
    """As in transformers, which samples all rows that config.json states."""
    export_huggingface(MemorySource(bytes_model(384)), tmp_path)
    assert resolve_model(tmp_path, tokenizer=tokens).config.vocab_size == 384


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (257,)),
        ({"generation_config.json": {"eos_token_id": [7, 8]}}, (7, 8, 257)),
        ({"generation_config.json": {"eos_token_id": [257, 9]}}, (257, 9)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 7}}, (7, 257)),
        ({"tokenizer_config.json": {"eos_token": None}}, ()),
        ({"tokenizer_config.json": {"eos_token": "<s>"}}, (256,)),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<unk>"}}, (258,)),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<new>"}}, (259,)),
    ],
)
def test_end_tokens_are_those_stated_and_the_one_named(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    tokens = samples.save(samples.byte_level(), tmp_path / "tokens")
    for name, content in files.items():
        (tokens / name).write_text(json.dumps(content))
    folder = write_megatron(tmp_path / "m", bytes_model(), rows=384, args={"vocab_size": None})
    assert resolve_model(folder, tokenizer=tokens).config.eos_token_ids == expected


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["x", True, -1, 1.5, [7, "x"], {"id": 7}])
def test_end_tokens_of_another_type_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    tokens = samples.save(samples.byte_level(), tmp_path / "tokens")
    (tokens / name).write_text(json.dumps({"eos_token_id": value}))
    folder = write_megatron(tmp_path / "m", bytes_model(), rows=384, args={"vocab_size": None})
    with pytest.raises(ConfigError, match=f"{name}: eos_token_id=.*: a token id"):
        resolve_model(folder, tokenizer=tokens)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_of_a_hugging_face_folder_are_checked_too(tmp_path: Path, name: str) -> None:
    export_huggingface(MemorySource(bytes_model()), tmp_path)
    path = tmp_path / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, "eos_token_id": 1.5}))
    with pytest.raises(ConfigError, match=rf"{name}: eos_token_id=1\.5: a token id"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("place", ["m/release/tokenizer", "m/release", "m", "m/tokenizer"])
@pytest.mark.parametrize("opened", ["m", "m/release"])
def test_where_a_megatron_checkpoint_has_its_tokenizer(
    tmp_path: Path, place: str, opened: str
) -> None:
    write_megatron(tmp_path / "m", bytes_model(), rows=384, args={"vocab_size": None})
    assert tokenizer_folder(tmp_path / opened) is None
    samples.save(samples.byte_level(), tmp_path / place)
    model = resolve_model(tmp_path / opened)
    assert model.tokenizer == tmp_path / place
    assert (model.config.vocab_size, model.config.eos_token_ids) == (TOKENS, (257,))


def test_the_null_tokenizers_end_of_document_ends_a_text(tmp_path: Path) -> None:
    args = {"tokenizer_type": "NullTokenizer", "vocab_size": 249}
    folder = write_megatron(tmp_path, bytes_model(250), rows=250, args=args)
    model = resolve_model(folder)
    assert (model.config.vocab_size, model.config.eos_token_ids) == (250, (249,))
    assert model.tokenizer is None
