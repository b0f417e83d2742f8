"""megatron-core checkpoints, written at TP x PP with optimizer state, give the original tensors."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import torch
from dist.checkpoint import checkpoint_kinds
from dist.checkpoint import checkpoint_writer as writer
from model_run import assert_logits

from sps2_mega.checkpoint.canonical import canonical_shapes
from sps2_mega.checkpoint.export import export_huggingface, export_megatron
from sps2_mega.checkpoint.load import load_weights
from sps2_mega.checkpoint.megatron import torch_dist
from sps2_mega.checkpoint.megatron.metadata import read_metadata
from sps2_mega.checkpoint.megatron.safe_pickle import read_records
from sps2_mega.checkpoint.megatron.stored_tensor import StoredValues
from sps2_mega.checkpoint.sharding import local_shapes, shard
from sps2_mega.checkpoint.source import open_checkpoint, read_canonical, tokenizer_folder
from sps2_mega.errors import CheckpointError

CORE_0_19 = Path(__file__).parents[2] / "data" / "core_0_19_pp2"
CASES = {
    # name: (writer, architecture, tp, pp)
    "torch_dist llama": (writer.write_torch_dist, writer.LLAMA, 2, 2),
    "torch_dist gpt2": (writer.write_torch_dist, writer.GPT2, 4, 1),
    "torch_dist numbered": (writer.write_numbered, writer.LLAMA, 2, 2),
    "torch_dist singleton": (writer.write_singleton, writer.LLAMA, 2, 2),
    "legacy qwen2": (writer.write_legacy, writer.QWEN2, 2, 2),
    "legacy gpt2": (writer.write_legacy, writer.GPT2, 2, 1),
}
KINDS = {
    # name: (writer, (tp, pp, vpp), further arguments), all of the llama
    "torch_dist, interleaved": (writer.write_torch_dist, (2, 2, 2), {}),
    "legacy, interleaved": (writer.write_legacy, (2, 2, 2), {}),
    "torch_dcp, FSDP2": (checkpoint_kinds.write_torch_dcp, (1, 1, 1), {"fsdp": True}),
    "Bridge": (checkpoint_kinds.write_bridge, (2, 2, 1), {}),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[harness.RankPool]:
    pool = harness.RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def roots(pool: harness.RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All checkpoints, each written once."""
    base = tmp_path_factory.mktemp("megatron")
    roots = {name: base / name.replace(" ", "_") for name in CASES}
    for name, (write, config, tp, pp) in CASES.items():
        pool.run(write, roots[name], config, tp, pp)
    return roots


def test_folder_of_core_0_19_has_its_arguments_in_common_state() -> None:
    """Written by megatron-core 0.19.2 at PP 2 with the same weights; it has no common.pt."""
    source = open_checkpoint(CORE_0_19)
    # NullTokenizer of 0.19: the last of its tokens is the end of document.
    assert source.config == replace(writer.LLAMA, eos_token_ids=(130,))
    assert (source.iteration, source.saved_layout, source.dtype) == (25, (1, 2), "float32")
    assert set(source.shapes()) == set(canonical_shapes(writer.LLAMA))
    for name, expected in writer.canonical_weights(writer.LLAMA).items():
        assert torch.equal(read_canonical(source, name, writer.LLAMA), expected), name
    args = read_metadata(CORE_0_19 / "iter_0000025").load("common_state")["args"]
    assert args.attention_backend == "auto"


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(roots: dict[str, Path], case: str) -> None:
    _, config, tp, pp = CASES[case]
    source = open_checkpoint(roots[case])
    assert source.config == config
    assert (source.iteration, source.saved_layout, source.dtype) == (25, (tp, pp), "float32")
    assert set(source.shapes()) == set(canonical_shapes(config))
    for name, expected in writer.canonical_weights(config).items():
        assert torch.equal(read_canonical(source, name, config), expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_comes_back_bit_for_bit(
    pool: harness.RankPool, tmp_path: Path, kind: str
) -> None:
    write, shape, options = KINDS[kind]
    pool.run(write, tmp_path, writer.LLAMA, *shape, **options)
    source = open_checkpoint(tmp_path)
    assert source.config == writer.LLAMA
    assert (source.iteration, source.saved_layout, source.dtype) == (25, shape[:2], "float32")
    assert set(source.shapes()) == set(canonical_shapes(writer.LLAMA))
    for name, expected in writer.canonical_weights(writer.LLAMA).items():
        assert torch.equal(read_canonical(source, name, writer.LLAMA), expected), name
    tokenizer = tokenizer_folder(tmp_path)
    assert tokenizer == (tmp_path / "iter_0000025" / "tokenizer" if kind == "Bridge" else None)


@pytest.mark.parametrize("write", [checkpoint_kinds.write_torch_dcp, checkpoint_kinds.write_bridge])
def test_fsdp_dtensor_is_refused_by_that_name(
    pool: harness.RankPool, tmp_path: Path, write: Callable[..., None]
) -> None:
    """The format is stated by arguments in the folder, or by Bridge's run_config.yaml."""
    pool.run(write, tmp_path, writer.LLAMA, 1, 1, ckpt_format="fsdp_dtensor")
    with pytest.raises(CheckpointError, match=r"ckpt_format='fsdp_dtensor' is not supported.*"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_checkpoint_loads_at_any_tp(roots: dict[str, Path], case: str, tp: int) -> None:
    config = CASES[case][1]
    source = open_checkpoint(roots[case])
    for rank in range(tp):
        parameters = {
            name: torch.full(s, torch.nan) for name, s in local_shapes(config, tp).items()
        }
        load_weights(parameters, source, config, tp_rank=rank, tp=tp)
        for name, expected in writer.canonical_weights(config).items():
            mine = shard(name, expected, config, tp_rank=rank, tp=tp)
            assert torch.equal(parameters[name], mine), (name, rank)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_are_those_of_transformers_at_any_tp(
    roots: dict[str, Path], tmp_path: Path, tp: int
) -> None:
    """transformers gets the weights through our Hugging Face export, itself tested bit for bit."""
    import transformers

    prompts = [[5], [1, 2, 3, 4, 5, 6, 70], list(range(33))]
    expected = {}
    for case, root in roots.items():
        folder = tmp_path / case.replace(" ", "_")
        export_huggingface(open_checkpoint(root), folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            expected[case] = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    # Weights of size one make logits of about a hundred.
    scale = max(
        logits.abs().max().item() for references in expected.values() for logits in references
    )
    assert_logits(expected, roots, prompts, tp=tp, sp=1, tolerance=1e-5 * scale)


def test_an_iteration_folder_is_opened_like_its_root(roots: dict[str, Path]) -> None:
    for root in roots.values():
        assert open_checkpoint(root / "iter_0000025").shapes() == open_checkpoint(root).shapes()


def test_reading_a_layer_reads_the_pieces_of_that_layer_only(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(roots["torch_dist llama"])
    loaded: list[int] = []
    original = torch_dist.locate

    def counting(file: Path, start: int, length: int, where: str) -> StoredValues | None:
        values = original(file, start, length, where)
        assert values is not None
        loaded.append(math.prod(values.shape))
        return values

    monkeypatch.setattr(torch_dist, "locate", counting)
    whole = source.read("decoder.layers.2.mlp.linear_fc1.weight")
    assert sum(loaded) == whole.numel()


def test_optimizer_and_random_state_are_never_read(roots: dict[str, Path], tmp_path: Path) -> None:
    folder = roots["torch_dist llama"] / "iter_0000025"
    index = {stored.name for stored in read_metadata(folder).tensors}
    metadata = read_records(folder / ".metadata")
    assert any(name.startswith("optimizer.state.exp_avg") for name in metadata.state_dict_metadata)
    assert not any("optimizer" in name or "rng" in name for name in index)


def test_a_given_configuration_replaces_the_stored_one(roots: dict[str, Path]) -> None:
    config = replace(writer.LLAMA, norm_eps=1e-6)
    assert open_checkpoint(roots["torch_dist llama"], config).config == config


def test_a_missing_legacy_rank_is_named(roots: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(roots["legacy qwen2"], copy)
    shutil.rmtree(copy / "iter_0000025" / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_000/model_optim_rng\.pt"):
        open_checkpoint(copy)


@pytest.mark.parametrize("case", CASES)
def test_our_own_checkpoint_loads_through_megatron(
    pool: harness.RankPool, roots: dict[str, Path], tmp_path: Path, case: str
) -> None:
    config = CASES[case][1]
    target = tmp_path / "converted"
    export_megatron(open_checkpoint(roots[case]), target, file_bytes=5000)
    assert len(list((target / "release").glob("*.distcp"))) > 2
    expected = writer.canonical_weights(config)
    for loaded in pool.run(writer.load_with_megatron, target / "release", config):
        for name, tensor in expected.items():
            assert torch.equal(loaded[name][: len(tensor)], tensor), name
