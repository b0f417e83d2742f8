"""Checkpoints written by megatron-core itself at real TP x PP x VPP, for tests to read back.

The functions run in a private pool of ranks: they patch `torch.cuda` calls that megatron-core's
writer makes even on a CPU, which must not leak into other tests. `checkpoint_kinds` adds folders
that other programs than Megatron-LM's `torch_dist` and legacy writers make.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import harness

from sps2_mega.config import ModelConfig, RopeConfig

LLAMA = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=8,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=131,
    max_position_embeddings=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=50000.0),
    dtype="float32",
)
QWEN2 = ModelConfig(
    family="qwen2",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=56,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=259,
    max_position_embeddings=64,
    norm_eps=1e-6,
    qkv_bias=True,
    tie_embeddings=True,
    dtype="float32",
)
GPT2 = ModelConfig(
    family="gpt2",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=4,
    head_dim=6,
    vocab_size=77,
    max_position_embeddings=40,
    norm="layernorm",
    norm_eps=1e-5,
    activation="gelu_tanh",
    linear_bias=True,
    tie_embeddings=True,
    rope=None,
    dtype="float32",
)
ITERATION = 25


def canonical_weights(config: ModelConfig, std: float = 1.0) -> dict[str, Any]:
    """Random canonical tensors, equal in every process; no two values of a tensor are alike.

    Matrices have standard deviation `std`; vectors have 1.
    """
    import torch

    from sps2_mega.checkpoint.canonical import canonical_shapes

    generator = torch.Generator().manual_seed(config.hidden_size)
    return {
        name: torch.randn(shape, generator=generator) * (std if len(shape) > 1 else 1.0)
        for name, shape in canonical_shapes(config).items()
    }


def write_numbered(rank: int, root: Path, config: ModelConfig, tp: int, pp: int) -> None:
    """Write as `write_torch_dist`, with one entry per layer instead of stacked ones."""
    write_torch_dist(rank, root, config, tp, pp, non_homogeneous_layers=True)


def write_singleton(rank: int, root: Path, config: ModelConfig, tp: int, pp: int) -> None:
    """Write as `write_torch_dist`, with the gate and up rows of an MLP as two tensors."""
    write_torch_dist(rank, root, config, tp, pp, singleton_local_shards=True)


def write_torch_dist(
    rank: int,
    root: Path,
    config: ModelConfig,
    tp: int,
    pp: int,
    vpp: int = 1,
    *,
    std: float = 1.0,
    with_args: bool = True,
    **metadata: bool,
) -> None:
    """Write model and Adam state, as a training run saves them, with the given `metadata`.

    `vpp` is the number of model chunks of a stage (interleaved pipeline). Without `with_args` the
    folder has no arguments, as Megatron Bridge writes it.
    """
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        optim_state_to_sharding_state,
    )

    chunks = build_chunks(config, tp, pp, vpp, std)
    metadata = {"dp_cp_group": data_parallel_group(), **metadata}
    sharded = by_chunk([chunk.sharded_state_dict(metadata=metadata) for chunk in chunks])
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    state = adam_state(parameters)
    ids = get_param_id_to_sharded_param_map(sharded, iter(parameters))
    optim_state_to_sharding_state(state, ids, exclude_keys=("step",))
    content = {
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        **sharded,
        "optimizer": state,
        "rng_state": ShardedObject(
            "rng_state", {"seed": rank}, (torch.distributed.get_world_size(),), (rank,)
        ),
    }
    if with_args:
        content["args"] = megatron_args(config, tp, pp, vpp, "torch_dist")
    save_torch_dist(rank, root, content)


def save_torch_dist(rank: int, root: Path, content: dict[str, Any]) -> None:
    """Save the state of all ranks as an iteration's folder, with the tracker beside it."""
    import torch
    from megatron.core import dist_checkpointing

    folder = iteration_folder(rank, root)
    with cpu_writer():
        dist_checkpointing.save(content, str(folder))
    torch.distributed.barrier()
    if rank == 0:
        write_tracker(root)


def write_legacy(
    rank: int,
    root: Path,
    config: ModelConfig,
    tp: int,
    pp: int,
    vpp: int = 1,
    *,
    std: float = 1.0,
) -> None:
    """Write one file per TP rank and pipeline stage, with optimizer and random state inside."""
    import numpy
    import torch
    from megatron.core import parallel_state

    chunks = build_chunks(config, tp, pp, vpp, std)
    if parallel_state.get_data_parallel_rank() == 0:
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if pp > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        folder = root / f"iter_{ITERATION:07d}" / name
        folder.mkdir(parents=True)
        state = {
            "args": megatron_args(config, tp, pp, vpp, "torch"),
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            **by_chunk([chunk.state_dict_for_save_checkpoint() for chunk in chunks]),
            "optimizer": adam_state([p for chunk in chunks for p in chunk.parameters()]),
            "rng_state": [{"np_rng_state": numpy.random.get_state()}],
        }
        torch.save(state, folder / "model_optim_rng.pt")
    torch.distributed.barrier()
    if rank == 0:
        write_tracker(root)


def load_with_megatron(rank: int, folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Load one of our checkpoints with megatron-core's own loader, at TP 1."""
    from megatron.core import dist_checkpointing

    model = build_model(config, 1, 1)
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": data_parallel_group()})
    wanted = {name: value for name, value in sharded.items() if not name.endswith("_extra_state")}
    loaded = dist_checkpointing.load({"model": wanted}, str(folder))
    assert loaded["checkpoint_version"] == 3.0
    return loaded["model"]


def build_model(config: ModelConfig, tp: int, pp: int) -> Any:
    """Build megatron-core's GPTModel of this rank's shard and stage, with the canonical weights."""
    (model,) = build_chunks(config, tp, pp)
    return model


def build_chunks(
    config: ModelConfig, tp: int, pp: int, vpp: int = 1, std: float = 1.0
) -> list[Any]:
    """The `vpp` model chunks of this rank, whose layers lie apart in the model where vpp > 1."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from sps2_mega.checkpoint.sharding import padded_vocab_size

    harness.default_group()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, vpp if vpp > 1 else None)
    megatron = transformer_config(config, tp, pp, vpp)
    norm = megatron.normalization
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for number in range(vpp):
        with cpu_writer():
            chunk = GPTModel(
                megatron,
                get_gpt_layer_local_spec(normalization=norm, qk_layernorm=config.qk_norm),
                padded_vocab_size(config.vocab_size, tp),
                config.max_position_embeddings,
                pre_process=stage == 0 and number == 0,
                post_process=stage == pp - 1 and number == vpp - 1,
                share_embeddings_and_output_weights=config.tie_embeddings,
                position_embedding_type="learned_absolute" if config.rope is None else "rope",
                vp_stage=number if vpp > 1 else None,
            )
        fill(chunk, config, tp, std)
        chunks.append(chunk)
    return chunks


def transformer_config(config: ModelConfig, tp: int, pp: int, vpp: int) -> Any:
    import torch
    import torch.nn.functional as F
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=config.gated,
        activation_func=F.silu if config.gated else F.gelu,
        add_bias_linear=config.linear_bias,
        add_qkv_bias=config.qkv_bias,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype=torch.float32,
        transformer_impl="local",
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def fill(model: Any, config: ModelConfig, tp: int, std: float = 1.0) -> None:
    """Copy each canonical weight's shard into the model; every parameter of the chunk gets one.

    Which layers of the model a chunk holds is what megatron-core says.
    """
    import torch
    from megatron.core import parallel_state

    from sps2_mega.checkpoint.canonical import OUTPUT_LAYER, WORD_EMBEDDINGS, split_layer
    from sps2_mega.checkpoint.sharding import shard

    weights = canonical_weights(config, std)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    first = model.decoder.layers[0].layer_number - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer, part = split_layer(name)
            canonical = name if layer is None else f"decoder.layers.{first + layer}.{part}"
            if canonical == OUTPUT_LAYER and config.tie_embeddings:
                canonical = WORD_EMBEDDINGS
            parameter.copy_(shard(canonical, weights[canonical], config, tp_rank=tp_rank, tp=tp))


def adam_state(parameters: list[Any]) -> dict[str, Any]:
    """State of Adam after one step, which leaves the parameters as they are."""
    import torch

    optimizer = torch.optim.Adam(parameters, lr=0.0)
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer.state_dict()


def by_chunk(states: list[Any]) -> dict[str, Any]:
    """States of the model chunks under Megatron-LM's names: `model`, or `model0`, `model1`, ..."""
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def megatron_args(
    config: ModelConfig, tp: int, pp: int, vpp: int = 1, ckpt_format: str = "torch_dist"
) -> Namespace:
    """Arguments of a training run: those that describe the model, and a few that do not."""
    import signal

    import torch
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    from sps2_mega.checkpoint.sharding import padded_vocab_size

    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        group_query_attention=config.num_kv_heads != config.num_heads,
        num_query_groups=config.num_kv_heads if config.num_kv_heads != config.num_heads else 1,
        kv_channels=config.head_dim,
        vocab_size=config.vocab_size,
        padded_vocab_size=padded_vocab_size(config.vocab_size, tp),
        max_position_embeddings=config.max_position_embeddings,
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        norm_epsilon=config.norm_eps,
        swiglu=config.gated,
        openai_gelu=False,
        bias_gelu_fusion=True,
        add_bias_linear=config.linear_bias,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        untie_embeddings_and_output_weights=not config.tie_embeddings,
        position_embedding_type="learned_absolute" if config.rope is None else "rope",
        rotary_base=10000 if config.rope is None else int(config.rope.theta),
        rotary_percent=1.0,
        use_rope_scaling=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        ckpt_format=ckpt_format,
        params_dtype=torch.float32,
        bf16=False,
        fp16=False,
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
        save=Path("/somewhere"),
    )


def data_parallel_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def iteration_folder(rank: int, root: Path) -> Path:
    """The iteration's folder, made by rank 0 before any other rank goes on."""
    import torch

    folder = root / f"iter_{ITERATION:07d}"
    if rank == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    return folder


def write_tracker(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")


@contextlib.contextmanager
def cpu_writer() -> Iterator[None]:
    with (
        mock.patch("torch.cuda.synchronize", lambda *_: None),
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
        mock.patch(
            "torch.Tensor.cuda", lambda tensor, *_: tensor
        ),  # tied weights of pipeline stages
    ):
        yield
