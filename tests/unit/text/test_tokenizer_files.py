"""Tokens that the files of a folder name, against transformers' generic class on the folder."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tokenizer_samples as samples
import tokenizers
from packaging import version

from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer

BASES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_bpe": samples.byte_bpe,
    "sentencepiece": samples.sentencepiece,
    "unigram": samples.unigram,
    "word_level": samples.word_level,
}
CHATML = "<|im_start|>user\nhi<|im_end|>"
TEXTS = (
    CHATML,
    "  the quick <pad> brown <s> fox</s> ",
    "Hello THE <IMG> <img> é user\nĠx ",
    "a é b<|im_end|>  <|im_start|>  thequick quickly",
)
START, END = {"content": "<|im_start|>"}, {"content": "<|im_end|>"}


@pytest.fixture(scope="module")
def generic() -> Callable[[Path], Any]:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return lambda folder: transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def assert_equal(folder: Path, generic: Callable[[Path], Any]) -> Tokenizer:
    ours, theirs = Tokenizer.load(folder), generic(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos_token_ids == ((theirs.eos_token_id,) if theirs.eos_token else ())
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    return ours


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": {"259": START, "260": END}}},
        {
            "tokenizer_config.json": {},
            "added_tokens.json": {"<|im_start|>": 259, "<|im_end|>": 260},
        },
        {"special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
        {"tokenizer_config.json": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
        {"tokenizer_config.json": {"extra_special_tokens": {"a": "<|im_start|>", "b": END}}},
        {"special_tokens_map.json": {"bos_token": START, "eos_token": END}},
        {"tokenizer_config.json": {"start_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
    ],
    ids=lambda files: "+".join(f"{name}:{'+'.join(map(str, c))}" for name, c in files.items()),
)
def test_added_tokens_are_whole_wherever_they_are_named(
    tmp_path: Path, generic: Callable[[Path], Any], files: dict[str, Any]
) -> None:
    samples.byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        text = json.dumps(content)
        if "extra" in text:  # transformers reads a mapping with flags only in its own spelling
            text = text.replace('{"content"', '{"__type": "AddedToken", "content"')
        (tmp_path / name).write_text(text)
    ours = assert_equal(tmp_path, generic)
    assert len(ours.encode(CHATML)) == 10 and len(ours.encode("<|im_none|>")) > 10
    if "eos_token" in json.dumps(files):
        assert ours.eos_token_ids == (ours.token_id("<|im_end|>"),)


def _flags(rng: random.Random) -> dict[str, bool]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: rng.random() < 0.3 for name in names if rng.random() < 0.8}


def _token(rng: random.Random, pool: list[str], *, typed: bool = True) -> Any:
    text = rng.choice(pool)
    if rng.random() < 0.6:
        return text
    return {"content": text, **_flags(rng)} | ({"__type": "AddedToken"} if typed else {})


def _before_5_23() -> bool:
    return version.parse(metadata.version("transformers")) < version.parse("5.23")


def _random_folder(rng: random.Random, folder: Path, backend: tokenizers.Tokenizer) -> None:
    """Files that name tokens in every way, some twice and with other flags."""
    pool = ["<|im_start|>", "<|im_end|>", "<pad>", " é", "Ġx", "<s>", "</s>", "the", "<IMG>"]

    def by_id() -> dict[int, str]:
        found, free = {}, backend.get_vocab_size()
        for text in rng.sample(pool, rng.randint(0, 4)):
            known = backend.token_to_id(text)
            found[free if known is None else known] = text
            free += known is None
        return found

    config: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "image_token"):
        if rng.random() < 0.4:
            config[name] = _token(rng, pool)
    if rng.random() < 0.3:
        config["additional_special_tokens"] = [_token(rng, pool), _token(rng, pool)]
    extra = [
        [_token(rng, pool), _token(rng, pool)],
        {"video_token": _token(rng, pool), "x": rng.choice(pool)},
        [],
    ]
    if rng.random() < 0.4:
        config["extra_special_tokens"] = rng.choice(extra)
        if _before_5_23():  # where the other field does not count beside it
            config.pop("additional_special_tokens", None)
    for name in ("split_special_tokens", "add_bos_token", "add_eos_token", "add_prefix_space"):
        if rng.random() < 0.2:
            config[name] = rng.random() < 0.5
    if rng.random() < 0.4:
        config["added_tokens_decoder"] = {
            str(token_id): {"content": text, **_flags(rng)} for token_id, text in by_id().items()
        }
    files: dict[str, Any] = {"tokenizer_config.json": config}
    if rng.random() < 0.4:
        names = ("bos_token", "eos_token", "audio_token")
        files["special_tokens_map.json"] = {
            name: _token(rng, pool, typed=False) for name in names if rng.random() < 0.5
        } | {"additional_special_tokens": rng.sample(pool, 2)}
    if rng.random() < 0.4:
        files["added_tokens.json"] = {text: token_id for token_id, text in by_id().items()}
    for name, content in files.items():
        if rng.random() < 0.9:
            (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("base", BASES)
def test_random_folders_equal_transformers(
    tmp_path: Path, generic: Callable[[Path], Any], base: str
) -> None:
    rng = random.Random(15)
    equal = 0
    for number in range(60):
        folder = tmp_path / str(number)
        folder.mkdir()
        backend = BASES[base]() if number == 0 else backend  # noqa: F821
        backend.save(str(folder / "tokenizer.json"))
        _random_folder(rng, folder, backend)
        try:
            assert_equal(folder, generic)
            equal += 1
        except ConfigError as error:
            # Two files give one id to two tokens: transformers lets one of them be another id.
            assert "is stated with id" in str(error)
    assert equal >= 50


def write(folder: Path, name: str, content: Any) -> Path:
    samples.save(samples.byte_level(), folder)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token=3: .*string"),
        ("tokenizer_config.json", {"eos_token": {"lstrip": True}}, "eos_token.content"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder=.*dict"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": START}}, "'x' must be a token id"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {"content": "<e>", "special": "yes"}}},
            "special='yes'",
        ),
        ("tokenizer_config.json", {"extra_special_tokens": "<e>"}, "extra_special_tokens='<e>'"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template=3"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "chat_template.0.template"),
        ("tokenizer_config.json", {"fix_mistral_regex": True}, "fix_mistral_regex=true"),
        (
            "tokenizer_config.json",
            {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.5.0.json"]},
            "tokenizer.5.0.json",
        ),
        ("tokenizer_config.json", "[" * 100_000, "is not JSON in UTF-8: RecursionError"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "is not JSON in UTF-8"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, not a list"),
        ("special_tokens_map.json", {"eos_token": 3}, "eos_token=3"),
        ("added_tokens.json", {"<e>": "9"}, "<e>='9': .*integer"),
        ("added_tokens.json", {"<e>": -1}, "<e>=-1: .*greater than or equal to 0"),
        ("added_tokens.json", {"<e>": 400}, "'<e>' is stated with id 400, .* free id is 259"),
        ("tokenizer.json", "{}", "is not a tokenizer file"),
        ("tokenizer.json", "[" * 100_000, "is not a tokenizer file"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, content: Any, message: str) -> None:
    folder = write(tmp_path, name, content)
    if name == "special_tokens_map.json" or name == "added_tokens.json":
        (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value) and name.split(".")[0] in str(caught.value) + name


def test_ids_that_contradict_the_vocabulary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tokenizer.json's own id counts against the files beside it, and it must not contradict
    itself."""
    folder = write(tmp_path, "added_tokens.json", {"</s>": 300})
    (folder / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.load(folder).token_id("</s>") == 257
    assert "'</s>' has id 257 in tokenizer.json, which counts" in caplog.text
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"][-1]["id"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"'<unk>' is stated with id 500, .* gives it 258"):
        Tokenizer.load(folder)


def test_a_vocabulary_with_holes(tmp_path: Path) -> None:
    """Its size is one more than the last id; an added token must not fall on an id in use."""
    words = tokenizers.models.WordLevel({"a": 0, "<unk>": 1, "b": 3}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert (ours.vocab_size, ours.decode([2]), ours.token_bytes(2)) == (4, "", b"")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<e>"}')
    with pytest.raises(ConfigError, match="'<e>' gets id 3, which 'b' has"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("base", BASES)
def test_texts_that_would_be_cleaned_up_are_refused(tmp_path: Path, base: str) -> None:
    samples.save(BASES[base](), tmp_path, clean_up_tokenization_spaces=True)
    if base in ("byte_bpe", "sentencepiece"):  # transformers never cleans these up
        assert Tokenizer.load(tmp_path).eos_token_ids
    else:
        with pytest.raises(ConfigError, match="clean_up_tokenization_spaces=true"):
            Tokenizer.load(tmp_path)


def vocabulary_files(folder: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 and older Qwen folders have."""
    model = json.loads(samples.byte_bpe().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges_become_what_transformers_makes_of_them(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": name, "eos_token": "</s>", "chat_template": "{{ eos_token }}x"}
    (vocabulary_files(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True
        )
    assert ours.eos_token_ids == (theirs.eos_token_id,) == (1,)
    assert ours.apply_chat_template([]) == theirs.encode("</s>x", add_special_tokens=False)


def _rank_lines() -> list[tuple[str, int]]:
    """Tokens of a tiktoken vocabulary in base64, with their ranks: all bytes and some merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" q", b"ui"]
    return [(base64.b64encode(token).decode(), rank) for rank, token in enumerate(tokens)]


@pytest.mark.parametrize("name", ["tekken.json", "tiktoken.model", "tokenizer.model"])
def test_tiktoken_files_become_what_transformers_makes_of_them(
    tmp_path: Path, generic: Callable[[Path], Any], name: str
) -> None:
    lines = _rank_lines()
    if name == "tekken.json":
        vocabulary = [{"rank": r, "token_bytes": t, "token_str": None} for t, r in lines]
        special = ["<unk>", "<s>", "</s>", "[INST]"]
        content = {
            "config": {
                "pattern": " ?[a-z]+|.",
                "num_vocab_tokens": 260,
                "default_vocab_size": 264,
                "default_num_special_tokens": 4,
                "version": "v3",
            },
            "vocab": vocabulary,
            "special_tokens": [
                {"rank": rank, "token_str": text, "is_control": True}
                for rank, text in enumerate(special)
            ],
        }
        (tmp_path / name).write_text(json.dumps(content))
    else:
        pytest.importorskip("tiktoken")
        (tmp_path / name).write_text("".join(f"{token} {rank}\n" for token, rank in lines))
        added = {"260": {"content": "<|im_end|>", "special": True}}
        settings = {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
        )
    ours = assert_equal(tmp_path, generic)
    assert ours.token_id("the") is not None and ours.decode(ours.encode("the quilt")) == "the quilt"


def test_a_vocabulary_without_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the tokenizer_class in a tokenizer_config"):
        Tokenizer.load(vocabulary_files(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "module", "packages"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15", "sentencepiece", "sentencepiece protobuf"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken"),
        ("tiktoken.model", b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    module: str,
    packages: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    find = "sps2_mega.text.tokenizer_conversion.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda wanted: None if wanted == module else object())
    with pytest.raises(ConfigError, match=f"pip install {packages},"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_lone_sentencepiece_model_makes_its_own_ids(tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(samples.CORPUS),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer.load(tmp_path)
    for text in ("", "  hi é 😀", "the quick brown fox"):
        assert ours.encode(text) == own.encode(text)
        assert ours.decode(own.encode(text)) == own.decode(own.encode(text))
    assert ours.vocab_size == own.get_piece_size() and ours.eos_token_ids == (own.eos_id(),)


@pytest.mark.parametrize(
    ("base", "name", "family", "expected"),
    [
        (samples.byte_bpe, "PreTrainedTokenizerFast", None, None),
        (samples.byte_bpe, "LlamaTokenizer", "llama", None),  # byte-level ones it leaves alone
        (samples.sentencepiece, "PreTrainedTokenizerFast", "llama", None),
        (samples.sentencepiece, "LlamaTokenizer", "llama", r"\(LlamaTokenizer\) makes other ids"),
        (samples.sentencepiece, "GPT2Tokenizer", None, r"of 'Hello world' \(8 instead of 11\)"),
        (samples.byte_bpe, "PreTrainedTokenizerFast", "qwen2", r"\(Qwen2Tokenizer\) makes other"),
        (samples.byte_level, "GemmaTokenizer", None, r"\(GemmaTokenizer\) (cannot|makes other)"),
    ],
)
def test_where_auto_tokenizer_rebuilds_the_rules(
    tmp_path: Path,
    base: Callable[[], tokenizers.Tokenizer],
    name: str,
    family: str | None,
    expected: str | None,
) -> None:
    transformers = pytest.importorskip("transformers")
    from sps2_mega.text.tokenizer_conversion import auto_tokenizer_difference

    samples.save(base(), tmp_path, tokenizer_class=name)
    if family is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    if _before_5_23() and (base, name) == (samples.byte_bpe, "LlamaTokenizer"):
        expected = "LlamaTokenizer"
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    found = auto_tokenizer_difference(tmp_path, ours.backend)
    assert (found is None) if expected is None else re.search(expected, str(found))


def test_reading_a_tokenizer_json_does_not_import_transformers(tmp_path: Path) -> None:
    """It would cost every rank seconds; a folder that has to be converted needs it."""
    folder = write(tmp_path, "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    code = (
        "import sys; from sps2_mega.text.tokenizer import Tokenizer\n"
        f"assert Tokenizer.load({str(folder)!r}).encode('x')\n"
        "assert 'torch' not in sys.modules\n"
        "from sps2_mega.checkpoint.resolve import resolve_model\n"
        "assert resolve_model('sps2-tiny').config.eos_token_ids\n"
        "sys.exit('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
