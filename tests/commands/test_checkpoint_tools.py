"""Output of the two command-line tools, and their one-line refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import tokenizer_samples as samples
import torch
from safetensors.torch import load_file, save_file
from unit.checkpoint.checkpoints import LLAMA, write_megatron

from sps2_mega.checkpoint.export import export_megatron
from sps2_mega.checkpoint.source import open_checkpoint
from sps2_mega.cli import doctor

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "model_configs" / "sps2-tiny"


@pytest.fixture
def convert() -> Callable[..., int]:
    return lambda *args: load("convert_checkpoint").main([str(arg) for arg in args])


@pytest.fixture
def inspect() -> Callable[..., int]:
    return lambda *args: load("inspect_checkpoint").main([str(arg) for arg in args])


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_convert_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture, convert) -> None:
    assert convert("hf-to-megatron", TINY, tmp_path / "m") == 0
    assert "2,428,160 parameters" in capsys.readouterr().out
    assert convert("megatron-to-hf", tmp_path / "m", tmp_path / "h") == 0
    files = [load_file(folder / "model.safetensors") for folder in (TINY, tmp_path / "h")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_convert_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, convert
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    assert convert("hf-to-megatron", TINY, tmp_path / "full") == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert convert("megatron-to-hf", TINY, tmp_path / "x") == 2
    assert "huggingface checkpoint, not a megatron one" in capsys.readouterr().err
    assert convert("hf-to-megatron", TINY, tmp_path / "x", "--config", "llama-2-7b") == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_inspect_as_json(tmp_path: Path, capsys: pytest.CaptureFixture, inspect) -> None:
    export_megatron(open_checkpoint(TINY), tmp_path / "m")
    assert inspect(tmp_path / "m", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.pop("architecture")["num_kv_heads"] == 4
    assert facts.pop("path").endswith("release")
    assert facts.pop("tokenizer") == {
        "folder": str(tmp_path / "m"),
        "tokens": 260,
        "end": [257],
        "chat_templates": [],
        "differs": None,
    }
    assert facts == {
        "format": "megatron torch_dist",
        "iteration": None,
        "dtype": "bfloat16",
        "parameters": 2_428_160,
        "tensors": 26,
        "saved_layout": {"tp": 1, "pp": 1},
        "complete": True,
        "problem": None,
        "settings": [],
    }


def test_inspect_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture, inspect
) -> None:
    tensors = load_file(TINY / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY / "config.json", tmp_path)
    assert inspect(tmp_path) == 2
    assert (
        "decoder.final_layernorm.weight (from model.norm.weight [256])" in capsys.readouterr().out
    )


def test_inspect_as_a_user_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "inspect_checkpoint.py")]
    done = subprocess.run([*command, TINY], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["format"] == "huggingface"
    assert (rows["parameters"], rows["complete"]) == ("2,428,160", "yes")


def test_inspect_and_doctor_say_where_auto_tokenizer_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture, inspect
) -> None:
    tokens = samples.save(
        samples.sentencepiece(), tmp_path / "tokens", tokenizer_class="LlamaTokenizer"
    )
    assert inspect(TINY, "--tokenizer", tokens) == 0
    lines = capsys.readouterr().out.splitlines()
    note = next(line for line in lines if line.startswith("note"))
    assert "AutoTokenizer (LlamaTokenizer) makes other ids of" in note
    (found, difference) = doctor.tokenizer(tokens)
    assert (found.status, difference.status) == ("ok", "wrong")
    assert "end 1, chat template none" in found.detail and "makes other ids" in difference.detail
    (tokens / "tokenizer.json").write_text("{}")
    (broken,) = doctor.tokenizer(tokens)
    assert (broken.status, broken.required) == ("wrong", True)


def test_a_padded_vocabulary_needs_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture, inspect, convert
) -> None:
    root = write_megatron(
        tmp_path / "m", replace(LLAMA, vocab_size=259), rows=384, args={"vocab_size": None}
    )
    for command in ((inspect, root), (convert, "megatron-to-hf", root, tmp_path / "x")):
        assert command[0](*command[1:]) != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert "only padded_vocab_size=384" in line and "--tokenizer DIR" in line
    tokens = samples.save(samples.byte_level(), tmp_path / "tokens")
    assert inspect(root, "--json", "--tokenizer", tokens) == 0
    assert json.loads(capsys.readouterr().out)["architecture"]["vocab_size"] == 259
    assert convert("megatron-to-hf", root, tmp_path / "hf", "--tokenizer", tokens) == 0
    assert open_checkpoint(tmp_path / "hf").config.vocab_size == 259


def test_an_architecture_can_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture, inspect, convert
) -> None:
    shutil.copytree(TINY, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    for command in ((inspect,), (convert, "hf-to-megatron")):
        more = [] if len(command) == 1 else [tmp_path / "x"]
        flags = [*command[1:], tmp_path / "hf", *more, "--config"]
        assert command[0](*flags[:-1]) == 2
        assert command[0](*flags, tmp_path / "nowhere.yaml") == 2
        refused, unknown = capsys.readouterr().err.splitlines()
        assert "cannot read" in refused and "there is no such file" in unknown
        assert command[0](*flags, "sps2-tiny") == 0
    assert inspect(tmp_path / "hf", "--config", "gpt2") == 2
    assert open_checkpoint(tmp_path / "x").config.eos_token_ids == (257,)


@pytest.mark.parametrize("refused", [{}, {"multi_latent_attention": True}])
def test_inspect_lists_settings_also_of_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, inspect, refused
) -> None:
    given = {"qk_layernorm": True, "num_experts": None, "bf16": True, **refused}
    root = write_megatron(tmp_path / "m", LLAMA, rows=128, args=given)
    code = inspect(root)
    out, err = capsys.readouterr()
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert ["qk_layernorm", "True", "run: qk_norm"] in lines
    assert code == 2  # these weights have no norms of queries and keys
    assert inspect(root, "--json") == 2
    assert json.loads(capsys.readouterr().out)["settings"]
    if not refused:
        assert (err, "complete" in out) == ("", True)
        return
    (line,) = err.splitlines()
    assert "multi_latent_attention=True is not supported" in line and "complete" not in out
    rows = {line[0]: line[2] for line in lines if len(line) == 3}
    assert rows["multi_latent_attention"].startswith("refused: ")
    assert not any(name == "num_experts" for name, *_ in lines)


def test_inspect_refuses_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture, inspect
) -> None:
    assert inspect(tmp_path) == 2
    assert capsys.readouterr().err.startswith("error: ")
