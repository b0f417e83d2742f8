from __future__ import annotations

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
    "unigram": samples.unigram,
    "word_level": samples.word_level,
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
    if folder.name.startswith(("unigram", "word_level")):
        pytest.skip("these have an unknown token for what they lack")
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


def test_where_templates_are_found(tmp_path: Path, reference) -> None:
    """Files of their own, then tokenizer_config.json: each time the one that transformers takes."""
    backend = samples.byte_level()
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    tools = [{"type": "function"}]

    def equal(folder: Path, plain: str | None, with_tools: str | None) -> None:
        ours, theirs = Tokenizer.load(folder), reference(folder)
        for expected, given in ((plain, None), (with_tools, tools)):
            if expected is None:
                with pytest.raises(RequestError, match="none is called default"):
                    ours.apply_chat_template(CHAT, tools=given)
                with pytest.raises(ValueError, match="no default"):
                    theirs.apply_chat_template(CHAT, tools=given, tokenize=False)
            else:
                assert theirs.apply_chat_template(CHAT, tools=given, tokenize=False) == expected
                assert ours.decode(ours.apply_chat_template(CHAT, tools=given)) == expected

    equal(samples.save(backend, tmp_path / "list", chat_template=named), "D", "T")
    equal(samples.save(backend, tmp_path / "no_default", chat_template=named[:1]), None, "T")
    folder = samples.save(backend, tmp_path / "both", chat_template={"default": "D", "rag": "R"})
    equal(folder, "D", "D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    equal(folder, None, "A")
    (folder / "chat_template.jinja").write_text("J")
    equal(folder, "J", "A")
    samples.save(backend, tmp_path / "c", chat_template="{% if %}")
    with pytest.raises(ConfigError, match="line 1"):
        Tokenizer.load(tmp_path / "c").apply_chat_template(CHAT)
    legacy = samples.save(backend, tmp_path / "legacy")
    (legacy / "chat_template.json").write_text('{"chat_template": "L"}')
    assert Tokenizer.load(legacy).chat_templates == {"default": "L"}
    (legacy / "chat_template.json").write_text('{"chat_template": 3}')
    with pytest.raises(ConfigError, match=r"chat_template\.json: chat_template must be a text"):
        Tokenizer.load(legacy)
