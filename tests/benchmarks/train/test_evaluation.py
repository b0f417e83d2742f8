"""Measures of the model card against values known by other means."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.train import evaluate as evaluation
from benchmarks.train.baselines import baseline_bits_per_byte, ngram_bits_per_byte
from benchmarks.train.model import TinyLlama
from tests.benchmarks.train.tiny_run import ARCHITECTURE, corpus, run_config, write_library

FILES = {"a.py": np.frombuffer(b"def f(x):\n    return x\n" * 300, np.uint8)}


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary() -> None:
    model = TinyLlama(ARCHITECTURE)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    texts = {"a": FILES["a.py"][:1001], "b": FILES["a.py"][:5]}
    assert evaluation.bits_per_byte(model, texts, 97) == pytest.approx(np.log2(260), abs=1e-3)


def test_padding_does_not_count_and_windows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = TinyLlama(ARCHITECTURE)
    text = FILES["a.py"][:130]
    halves = {"a": text[:65], "b": text[65:]}
    together = evaluation.bits_per_byte(model, {"whole": text}, 65)
    assert evaluation.bits_per_byte(model, halves, 100) == pytest.approx(together, abs=2e-3)


def test_an_ngram_model_by_hand() -> None:
    # Order 1 after "aab": a 2 of 3, b 1 of 3, two distinct bytes, so (n + 2/256) / (3 + 2).
    train, text = (np.frombuffer(t, np.uint8) for t in (b"aab", b"abz"))
    expected = [(2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (2 / 256) / 5]
    assert ngram_bits_per_byte(train, text, 1) == pytest.approx(-np.log2(expected).mean())
    # Order 2: after a came a and b once each; after b nothing, so z keeps its order 1 probability.
    second = [expected[0], (1 + 2 * expected[1]) / 4, expected[2]]
    assert ngram_bits_per_byte(train, text, 2) == pytest.approx(-np.log2(second).mean())


def test_ngram_probabilities_sum_to_one() -> None:
    train = np.random.default_rng(0).integers(0, 4, 500).astype(np.uint8)
    context = train[100:104].tolist()
    # The text differs in its last byte only: the sum over all bytes of that one's probability.
    total = 0.0
    prefix = -ngram_bits_per_byte(train, np.array(context, np.uint8), 5) * 4
    for byte in range(256):
        text = np.array([*context, byte], np.uint8)
        total += 2 ** (-ngram_bits_per_byte(train, text, 5) * 5 - prefix)
    assert total == pytest.approx(1.0)


def test_baselines_agree_with_the_compressors(tmp_path: Path) -> None:
    read = corpus(tmp_path)
    bits = baseline_bits_per_byte(read)
    held_out = np.concatenate(list(read.held_out.values())).tobytes()
    assert bits["gzip"] == pytest.approx(8 * len(gzip.compress(held_out, 9)) / len(held_out))
    assert bits["xz_after_training_files"] < bits["xz"]
    assert 0 < bits["5-gram"] < 8


@pytest.mark.parametrize("task", evaluation.TASKS)
@pytest.mark.parametrize("depth", [0.05, 0.5, 0.95])
def test_a_probe_has_its_answer_at_the_asked_depth(task: str, depth: float) -> None:
    for seed in range(10):
        document, answer = evaluation.probe(task, 1500, depth, np.random.default_rng(seed), FILES)
        text = document.tobytes()
        assert len(text) == 1500 and text.endswith(answer.encode())
        before = text[: -len(answer)]
        value = text[-5:]
        at = before.index(value)
        assert value.isdigit() and abs(at - depth * 1500) < 200
        assert before.count(value) == 1
        if task == "passkey":
            continue
        asked = before.rsplit(b"assert ", 1)[1].removesuffix(b" == ")
        if task == "reference":
            asked = before.split(asked + b" = ")[1].split(b"\n")[0]
            assert answer.encode() == asked + b" == " + value
        assert asked + b" = " + value + b"\n" in before
        assert before.count(b" = ") == (10 if task == "key_value" else 11)


def test_a_model_that_looks_the_answer_up_finds_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retrieval counts a probe only if all five digits are the likeliest."""

    def knows(spoilt: int):
        def logits(model: object, targets: torch.Tensor) -> torch.Tensor:
            right = torch.nn.functional.one_hot(targets, 260).float()
            right[:spoilt, -3] = 0.0
            return right

        return logits

    model = TinyLlama(ARCHITECTURE)
    arguments = dict(task="key_value", length=1024, num_probes=15, seed=1)
    monkeypatch.setattr(evaluation, "_logits", knows(spoilt=0))
    assert evaluation.retrieval(model, FILES, **arguments)["all"] == 1.0
    monkeypatch.setattr(evaluation, "_logits", knows(spoilt=1))
    found = evaluation.retrieval(model, FILES, **arguments)
    assert found["all"] == pytest.approx(2 / 3) and found["num_probes"] == 15


def test_the_command_trains_resumes_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import train_tiny
    from benchmarks.train import config as config_module
    from benchmarks.train import corpus as corpus_module

    (tmp_path / "library").mkdir()
    write_library(tmp_path / "library")
    library = tmp_path / "library"
    read = corpus_module.read_corpus
    monkeypatch.setattr(config_module, "load_train_config", lambda path, device: run_config())
    monkeypatch.setattr(corpus_module, "read_corpus", lambda config: read(config, library))
    monkeypatch.setattr(train_tiny, "LENGTHS", (350, 9999))
    flags = ["--output", str(tmp_path / "run"), "--device", "cpu", "--probes", "5"]
    assert train_tiny.main(flags) == 0
    facts = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert facts["steps"] == 6 and "model, windows of 350" in facts["bits_per_byte"]
    assert list(facts["retrieval_exact_match"]["passkey"]) == ["350"]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert train_tiny.main(flags) == 0
    assert "after step 6 of 6" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == weights
    assert train_tiny.main(["--evaluate", str(tmp_path / "absent"), "--device", "cpu"]) == 2
    assert "absent" in capsys.readouterr().err
