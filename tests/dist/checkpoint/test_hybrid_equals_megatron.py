"""Checkpoints of megatron-core's HybridModel give the logits of that model (0.18 and later)."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import free_port, run_ranks
from model_run import assert_logits

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 70], list(range(33))]
ARGS: dict[str, Any] = dict(
    num_layers=4, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, kv_channels=8,
    group_query_attention=True, num_query_groups=2, normalization="RMSNorm", norm_epsilon=1e-5,
    swiglu=True, add_bias_linear=False, untie_embeddings_and_output_weights=True,
    position_embedding_type="rope", rotary_base=20000, max_position_embeddings=64,
    tokenizer_type="NullTokenizer", vocab_size=130, padded_vocab_size=256, is_hybrid_model=True,
    spec=["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
    tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
)  # fmt: skip


def has_hybrid_model() -> bool:
    try:
        return find_spec("megatron.core.models.hybrid.hybrid_model") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(not has_hybrid_model(), reason="this release has no HybridModel")
@pytest.mark.parametrize("pattern", ["*-*-", "**-*", "-*-*"])
def test_a_hybrid_of_attention_and_mlp_equals_megatron(pattern: str, tmp_path: Path) -> None:
    (expected,) = run_ranks(save_and_run, 1, pattern, str(tmp_path), free_port(), timeout=300)
    for tp, sp in ((1, 1), (2, 1), (1, 2)):
        assert_logits(
            {"hybrid": expected}, {"hybrid": tmp_path}, PROMPTS, tp=tp, sp=sp, tolerance=1e-4
        )


def save_and_run(rank: int, pattern: str, folder: str, port: int) -> list[Any]:
    """Save a hybrid as Megatron does and return its logits of the prompts, [T, vocab] each."""
    import os

    from dist.checkpoint import checkpoint_writer, stock_megatron
    from megatron.core import dist_checkpointing

    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    groups = initialize(
        store, info, agree_topology(store, info, ParallelConfig()), device=cpu, timeout_s=120
    )
    assert groups.tp.size == 1
    with stock_megatron.cpu_as_device():
        model = hybrid_model(pattern).float().eval()
        stock_megatron.random_weights(model)
        iteration = Path(folder) / "iter_0000003"
        iteration.mkdir()
        content = {
            "args": Namespace(**ARGS, hybrid_layer_pattern=pattern),
            "iteration": 3,
            "model": model.sharded_state_dict(),
        }
        with checkpoint_writer.cpu_writer():
            dist_checkpointing.save(content, str(iteration))
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("3")
        with torch.inference_mode():
            logits = [
                model(torch.tensor([prompt]), torch.arange(len(prompt))[None], None)[0].clone()
                for prompt in PROMPTS
            ]
    finalize()
    return [each[:, :131] for each in logits]


def hybrid_model(pattern: str) -> Any:
    """HybridModel with local layers: the ones of Transformer Engine need a GPU."""
    from unittest import mock

    import torch.nn.functional as F
    from dist.checkpoint.stock_megatron import FORCED
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import (
        ModuleSpec,
        TransformerConfig,
        TransformerLayer,
        TransformerLayerSubmodules,
    )
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(
        **{name: value for name, value in FORCED.items() if hasattr(TransformerConfig, name)},
        num_layers=4, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, kv_channels=8,
        num_query_groups=2, normalization="RMSNorm", layernorm_epsilon=1e-5,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        bias_activation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    attention = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=DotProductAttention,
                linear_proj=RowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    stack = ModuleSpec(
        module=hybrid_block.HybridStack,
        submodules=hybrid_block.HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
    with mock.patch.object(hybrid_block, "TENorm", WrappedTorchNorm):
        return HybridModel(
            config=config,
            hybrid_stack_spec=stack,
            vocab_size=256,
            max_sequence_length=64,
            hybrid_layer_pattern=pattern,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=20000,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
