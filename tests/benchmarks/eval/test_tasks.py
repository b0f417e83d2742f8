"""Texts and probes: held-out data, places of needles, and every answer present in its prompt."""

from __future__ import annotations

import json

import pytest
import tokenizer_samples

from benchmarks.eval.tasks import DEPTHS, TASKS, judge, make_probe
from benchmarks.eval.texts import load_texts, windows
from sps2_mega.errors import ConfigError
from sps2_mega.text.tokenizer import Tokenizer

LINE = "def name_{i}(x):\n    return x + {i}\n"
TEXTS = {
    f"file{n}": "".join(LINE.format(i=1000 * n + i) for i in range(300)).encode() for n in range(3)
}


@pytest.fixture(scope="module", params=["byte_level", "byte_bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    backend = getattr(tokenizer_samples, request.param)()
    return Tokenizer.load(tokenizer_samples.save(backend, folder))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [401, 1024])
def test_a_probe_fits_its_length_and_has_its_answer_at_its_depth(tokenizer, task, length):
    for depth in DEPTHS:
        probe = make_probe(
            task,
            length=length,
            depth=depth,
            index=1,
            seed=5,
            texts=TEXTS,
            tokenizer=tokenizer,
        )
        answer_len = len(tokenizer.encode(probe.answer, add_special_tokens=False))
        total = len(probe.prompt_ids) + answer_len
        if probe.question_ids:  # and the first turn's answer
            total += answer_len + len(probe.question_ids)
        assert 0.9 * length <= total <= length
        assert probe.new_tokens >= answer_len
        text = tokenizer.decode(probe.prompt_ids)
        needle = probe.answer.split(", ")[0].split(" == ")[-1]
        place = text.index(needle) / len(text)
        # Events stand between lines, and the others before one take room too: much of a short
        # prompt.
        assert abs(place - depth) < (0.15 if length > 1000 else 0.3), (task, depth, place)


def test_the_same_arguments_give_the_same_probe(tokenizer):
    def probe(**changes):
        given = dict(length=401, depth=0.5, index=0, seed=1, texts=TEXTS, tokenizer=tokenizer)
        return make_probe("key_value", **given | changes)

    assert probe() == probe()
    for changes in (dict(index=1), dict(seed=2), dict(depth=0.4)):
        assert probe(**changes).prompt_ids != probe().prompt_ids


def test_a_second_turn_asks_for_another_name_than_the_first(tokenizer):
    probe = make_probe(
        "second_turn", length=700, depth=0.3, index=2, seed=1, texts=TEXTS, tokenizer=tokenizer
    )
    prompt, question = map(tokenizer.decode, (probe.prompt_ids, probe.question_ids))
    lines = dict(line.split(" = ") for line in prompt.splitlines() if " = " in line)
    first = prompt.splitlines()[-1].removeprefix("assert ").removesuffix("==").strip(" =")
    second = question.strip().removeprefix("assert ").removesuffix("==").strip(" =")
    assert first != second
    assert lines[second] == probe.answer != lines[first]


def test_texts_shorter_than_a_prompt_are_joined(tokenizer):
    few = {"a": b"x = 1\n" * 5, "b": b"y = 2\n" * 7}
    probe = make_probe(
        "passkey", length=401, depth=0.5, index=0, seed=0, texts=few, tokenizer=tokenizer
    )
    assert probe.answer in tokenizer.decode(probe.prompt_ids)


def test_a_length_too_short_for_the_task_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="copy does not fit 40 tokens"):
        make_probe("copy", length=40, depth=0.5, index=0, seed=0, texts=TEXTS, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("71920 and more", (True, 1.0)),
        ("71x20", (False, 0.4)),
        ("", (False, 0.0)),
        ("7", (False, 0.2)),
    ],
)
def test_an_answer_is_right_when_the_text_begins_with_it(text, verdict):
    assert judge("71920", text) == verdict


def test_windows_are_whole_and_disjoint(tokenizer):
    found = windows(TEXTS, tokenizer, length=301, count=5, seed=0)
    assert [len(window) for window in found] == [301] * 5
    texts = [tokenizer.decode(window) for window in found]
    assert len(set(texts)) == 5
    for text in texts:
        assert sum(text.strip() in whole.decode() for whole in TEXTS.values()) == 1
    bos = tokenizer.bos_token_id
    assert {window.count(bos) for window in found} == ({1} if tokenizer.encode("")[:1] else {0})


def test_too_little_data_is_refused_with_numbers(tokenizer):
    with pytest.raises(ConfigError, match=r"4 texts of 99999 tokens are needed, the data has 0"):
        windows(TEXTS, tokenizer, length=99999, count=4, seed=0)


def test_texts_come_from_files_lines_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89")
    lines = [{"text": "second"}, {"id": 3, "prompt": "third"}, "fourth"]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(load_texts(tmp_path).values()) == [b"first", b"second", b"third", b"fourth"]
    assert list(load_texts(tmp_path / "a.txt").values()) == [b"first"]


@pytest.mark.parametrize(
    ("line", "words"), [("{", ["bad.jsonl:2", "not JSON"]), ('{"id": 1}', ["bad.jsonl:2", "text"])]
)
def test_bad_lines_are_named(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ConfigError) as error:
        load_texts(file)
    for word in words:
        assert word in str(error.value)


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_texts(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no file ends with \.txt"):
        load_texts(tmp_path)


def test_the_default_texts_are_held_out_from_training():
    from benchmarks.eval.texts import TRAINING
    from benchmarks.train.config import load_train_config
    from benchmarks.train.corpus import is_held_out

    every = load_train_config(TRAINING, "cpu").corpus.hold_out_every
    assert all(is_held_out(name, every) for name in load_texts(None))
