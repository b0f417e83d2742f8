from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizer_samples as samples

from sps2_mega.errors import ConfigError, RequestError
from sps2_mega.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "x",
    " two  spaces and\ttab\r\n",
    "Größe 你好 😀👩‍💻 \x00 end",
    "inside <s> a special </s> token",
    "the quick brown fox" * 40,
]
KINDS = {
    "byte_level": samples.byte_level,
    "byte_bpe": samples.byte_bpe,
    "sentencepiece": samples.sentencepiece,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('bad role ' + "
    "m['role']) }}{% endif %}\n"
    "<{{ m['role'] }}>{{ m['content'] | trim }}{{ {'a': m['content']} | tojson }}{{ eos_token }}\n"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% generation %}{% endgeneration %}{% endif %}"
)
CHAT = [{"role": "user", "content": " <b>hé</b> "}, {"role": "assistant", "content": "ok"}]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp(request.param)
    return samples.save(KINDS[request.param](), target, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return lambda folder: transformers.AutoTokenizer.from_pretrained(str(folder))


def test_encode_and_decode_equal_transformers(folder: Path, reference) -> None:
    ours, theirs = Tokenizer.load(folder), reference(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == set(theirs.all_special_ids)


def test_chat_template_equals_transformers(folder: Path, reference) -> None:
    ours, theirs = Tokenizer.load(folder), reference(folder)
    text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT) == ours.encode(text, add_special_tokens=False)
    expected = theirs.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT) == list(getattr(expected, "input_ids", expected))
    assert ours.has_chat_template


def test_bytes_of_tokens_add_up_to_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for text in TEXTS[1:4]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == text.lstrip()
    assert tokenizer.token_bytes(10**6) == b""


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = samples.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_token="<unk>", pad_id=258)
    tokenizer = Tokenizer.load(samples.save(backend, tmp_path))
    assert len(tokenizer.encode("x" * 50)) == 51
    assert len(tokenizer.encode("x")) == 2


def test_template_error_is_the_requests_fault(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(RequestError, match="bad role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(RequestError, match="messages"):
        tokenizer.apply_chat_template([{"role": "user"}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_templates_run_in_a_sandbox(tmp_path: Path, attack: str) -> None:
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path, chat_template=attack))
    with pytest.raises(RequestError):
        tokenizer.apply_chat_template(CHAT)


def test_model_without_template_writes_plain_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.load(samples.save(samples.byte_level(), tmp_path))
    with caplog.at_level("INFO"):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert not tokenizer.has_chat_template
    assert ids == tokenizer.encode("user: hi\nassistant:")
    assert "no chat template" in caplog.text


def prompt_text(folder: Path) -> str:
    tokenizer = Tokenizer.load(folder)
    return tokenizer.decode(tokenizer.apply_chat_template(CHAT))


def test_where_templates_are_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = samples.save(samples.byte_level(), tmp_path, chat_template=named)
    assert prompt_text(folder) == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert prompt_text(folder) == "J"
    samples.save(samples.byte_level(), tmp_path / "b", chat_template=named[:1])
    with pytest.raises(ConfigError, match="tool_use"):
        Tokenizer.load(tmp_path / "b")
    samples.save(samples.byte_level(), tmp_path / "c", chat_template="{% if %}")
    with pytest.raises(ConfigError, match="line 1"):
        Tokenizer.load(tmp_path / "c").apply_chat_template(CHAT)


def test_special_tokens_map_is_a_fallback(tmp_path: Path) -> None:
    folder = samples.save(samples.byte_level(), tmp_path, eos_token=None)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "no"})
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == (257,)
    assert tokenizer.bos_token_id == 256


def test_folders_without_tokenizer_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="--tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match="save_pretrained"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer file"):
        Tokenizer.load(tmp_path)
