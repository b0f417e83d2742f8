"""Corpus, generated documents and batches: held-out files, loss weights, the data of a step."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.train import tasks
from benchmarks.train.batches import BatchMaker, positions
from benchmarks.train.config import CorpusConfig, Stage
from benchmarks.train.corpus import BOS, EOS, read_corpus
from benchmarks.train.document import Event, interleave
from sps2_mega.errors import ConfigError
from tests.benchmarks.train.tiny_run import corpus, run_config, write_library

CODE = np.frombuffer(b"".join(b"line_%03d = call(%d)\n" % (i, i) for i in range(600)), np.uint8)


def test_whole_files_are_held_out_by_their_path_alone(tmp_path: Path) -> None:
    config = CorpusConfig(hold_out_every=3, max_file_bytes=5000, exclude=("tests",))
    for folder in ("a", "a/tests", "tests/b"):
        (tmp_path / folder).mkdir(parents=True)
        write_library(tmp_path / folder)
    (tmp_path / "big.py").write_text("#" * 5001)
    (tmp_path / "empty.py").write_text("")
    read = read_corpus(config, tmp_path)
    assert {*read.train, *read.held_out} == {f"a/module{i}.py" for i in range(9)}
    assert read.train and read.held_out and not read.train.keys() & read.held_out.keys()
    for i in range(9):
        (tmp_path / f"a/module{i}.py").write_text("changed\n")
    assert read_corpus(config, tmp_path).held_out.keys() == read.held_out.keys()


def test_a_library_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        read_corpus(run_config().corpus, tmp_path)


def test_the_stream_keeps_files_apart(tmp_path: Path) -> None:
    read = corpus(tmp_path)
    stream = read.train_stream()
    assert (stream == BOS).sum() == (stream == EOS).sum() == len(read.train)
    assert len(stream) == sum(len(text) + 2 for text in read.train.values())
    first = next(iter(read.train.values()))
    assert stream[: len(first) + 2].tolist() == [BOS, *first.tolist(), EOS]


@pytest.mark.parametrize("length", [97, 512, 2047])
@pytest.mark.parametrize("kind", tasks.KINDS)
def test_every_answer_can_be_read_from_what_stands_before(kind: str, length: int) -> None:
    for seed in range(25):
        rng = np.random.default_rng(seed)
        text, weights = tasks.make_document(kind, rng, length, CODE[: 2 * length + 500])
        assert text.shape == weights.shape == (length,)
        answers = np.flatnonzero(weights == tasks.FIRST)
        for at in answers:
            end = at + 1
            while end < length and weights[end] == tasks.REST:
                end += 1
            answer = text[at:end].tobytes()
            assert answer.isdigit() and answer in text[:at].tobytes()
        # A very short document may have no room left for a question.
        assert len(answers) or kind == "copy" or length == 97


def test_a_reference_is_answered_with_the_name_it_refers_to_and_its_value() -> None:
    hops = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        text = tasks.make_document("reference", rng, 1000, CODE)[0].tobytes().decode()
        values: dict[str, str] = {}
        for line in re.findall(r"^(?:assert )?\w+_\w+ ==? [\w =]+$", text, re.MULTILINE):
            name, *said = line.removeprefix("assert ").replace("==", "=").split(" = ")
            if line.startswith("assert"):
                hops += len(said) == 2
                assert said == (
                    [values[name]]
                    if values[name].isdigit()
                    else [values[name], values[values[name]]]
                )
            else:
                (values[name],) = said
    assert hops > 20


def test_names_of_a_document_are_distinct_even_where_few_are_possible() -> None:
    for seed in range(50):
        found = tasks.names(np.random.default_rng(seed), 16)
        assert len(set(found)) == 16


@pytest.mark.parametrize("length", [301, 1000])
def test_events_stand_in_order_at_their_places_and_the_length_is_exact(length: int) -> None:
    events = [
        Event(1.0, [("ask", 0.0), ("42", 8.0)]),
        Event(0.3, [("first\n", 0.0)]),
        Event(0.7, [("second\n", 0.25)]),
    ]
    text, weights = interleave(events, length, CODE[: 2 * length])
    content = text.tobytes()
    assert len(content) == len(weights) == length
    assert content.endswith(b"ask42") and weights[-2:].tolist() == [8.0, 8.0]
    first, second = content.index(b"first\n"), content.index(b"second\n")
    assert abs(first - 0.3 * length) < 60 and abs(second - 0.7 * length) < 60
    assert content[first - 1 : first] == b"\n"  # never in the middle of a line
    assert (weights[second : second + 7] == 0.25).all()
    rest = content.replace(b"first\n", b"").replace(b"second\n", b"").removesuffix(b"ask42")
    assert rest in CODE.tobytes()  # the code itself has no gap


def test_a_batch_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    read = corpus(tmp_path)
    maker, again = BatchMaker(run_config(), read), BatchMaker(run_config(), read)
    later = [maker.batch(step) for step in (3, 5)]
    assert later[0].inputs.shape == (3, 97) and later[1].inputs.shape == (1, 203)
    for step, batch in zip((3, 5), later, strict=True):
        other = again.batch(step)
        for name in ("inputs", "targets", "weights", "positions"):
            assert (getattr(batch, name) == getattr(other, name)).all()
        assert (batch.inputs[:, 0] == BOS).all()
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
    assert not (maker.batch(2).targets == maker.batch(3).targets).all()
    other_seed = BatchMaker(run_config(seed=4), read)
    assert not (other_seed.batch(3).targets == later[0].targets).all()


def test_a_corpus_of_short_files_only_is_refused_with_the_numbers(tmp_path: Path) -> None:
    long = Stage(length=3001, batch=1, steps=1, jump=0.0, max_position=3001, mix={"code": 1.0})
    with pytest.raises(ConfigError, match=r"3001 .* 6002"):
        BatchMaker(run_config(stages=(long,)), corpus(tmp_path))


def test_positions_jump_at_most_once_and_stay_below_the_limit() -> None:
    stage = Stage(length=101, batch=1, steps=1, jump=0.8, max_position=999, mix={})
    jumped = 0
    for seed in range(200):
        steps = np.diff(positions(np.random.default_rng(seed), stage))
        assert (steps >= 1).all() and (steps > 1).sum() <= 1 and steps.sum() < 999
        jumped += int((steps > 1).sum())
    assert 130 < jumped < 190
