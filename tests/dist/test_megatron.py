"""Facts about Megatron-core that we rely on; every shipped model configuration builds on it."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from harness import free_port, run_ranks

from sps2_mega.checkpoint.model_file import model_files, read_model_file
from sps2_mega.checkpoint.sharding import check_tp, local_shapes, num_parameters
from sps2_mega.errors import ConfigError
from sps2_mega.mcore.packed_weights import can_pack


def facts_on_rank(rank):
    """Facts that `mcore._compat` takes for granted, read off Megatron's own signatures."""
    from sps2_mega.mcore._compat import eager_import, step_carrier_class

    with eager_import("cpu"):
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.transformer_block import TransformerBlock
    import torch

    carrier = step_carrier_class()(attention="mine", num_tokens=3)
    return {
        "carrier": isinstance(carrier, PackedSeqParams),
        "format": carrier.qkv_format,
        "attention": carrier.attention,
        "block": list(inspect.signature(TransformerBlock.forward).parameters),
        "compile_is_back": torch.compile.__module__.startswith("torch"),
    }


def test_megatron_still_carries_our_step_to_the_core_attention():
    (facts,) = run_ranks(facts_on_rank, 1)
    assert facts["carrier"]
    assert facts["format"] != "thd"
    assert facts["attention"] == "mine"
    assert {"packed_seq_params", "rotary_pos_emb", "hidden_states"} <= set(facts["block"])
    # That layers carry it on, and what `run_layers` and `run_final_norm` do in the block's place,
    # is a matter of behaviour: `test_slices_of_layers_do_what_megatrons_loop_does`.
    assert facts["compile_is_back"]


def meta_shapes_on_rank(rank, port, configs, tp):
    """Names and shapes of each model's parameters on the meta device, for TP rank 0 of `tp`."""
    import torch

    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.build import build_gpt_model
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    os.environ["MASTER_PORT"] = str(port)  # a new one: the last job's store may still be closing
    info = from_environment()
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig(tp=tp))
    initialize(store, info, topology, device=torch.device("cpu"), timeout_s=60)
    shapes = {}
    for name, config in configs.items():
        model = build_gpt_model(config, tp=tp, sp=1, dtype=torch.bfloat16)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        shapes[name] = {key: tuple(value.shape) for key, value in model.named_parameters()}
    finalize()
    return shapes


def shipped_configs():
    return {name: read_model_file(path).config for name, path in model_files().items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_model_configuration_builds_with_its_shapes(tp):
    configs = {}
    for name, config in shipped_configs().items():
        try:
            check_tp(config, tp)
            configs[name] = config
        except ConfigError:
            assert tp > 1
    assert len(configs) >= 7
    for shapes in run_ranks(meta_shapes_on_rank, tp, free_port(), configs, tp, timeout=200):
        for name, config in configs.items():
            assert shapes[name] == local_shapes(config, tp), name


def test_built_parameter_counts_are_the_published_ones():
    """The unpadded count of the pure formula equals Megatron's, less the vocabulary's padding."""
    configs = shipped_configs()
    (shapes,) = run_ranks(meta_shapes_on_rank, 1, free_port(), configs, 1, timeout=200)
    for name, config in configs.items():
        built = 0
        for key, shape in shapes[name].items():
            rows = shape[0]
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows = config.vocab_size
            size = rows
            for dim in shape[1:]:
                size *= dim
            built += size
        assert built == num_parameters(config), name
    assert num_parameters(configs["llama-3-8b"]) == 8_030_261_248
    assert num_parameters(configs["llama-3.1-70b"]) == 70_553_706_496
    assert num_parameters(configs["gpt2"]) == 124_439_808


ROWS = torch.arange(13)


def layers_on_rank(rank, port, folder):
    """Hidden states by Megatron's own loop over layers, and by ours in slices of one."""
    import torch

    from sps2_mega.checkpoint.resolve import resolve_model
    from sps2_mega.config import ParallelConfig
    from sps2_mega.mcore.gpt import GPT
    from sps2_mega.mcore.init import agree_topology, finalize, initialize, open_store
    from sps2_mega.parallel.launcher import from_environment

    class Averaging:
        """Attention that needs no cache: each token gets the mean value of those before it."""

        def run_layer(self, layer, q_TNH, k_TKH, v_TKH, softmax, rotation=None):
            counts = torch.arange(1, len(v_TKH) + 1).view(-1, 1, 1)
            mean_TKH = v_TKH.cumsum(0) / counts
            return mean_TKH.repeat_interleave(q_TNH.shape[1] // v_TKH.shape[1], 1)

    os.environ["MASTER_PORT"] = str(port)
    info, cpu = from_environment(), torch.device("cpu")
    store = open_store(info)
    topology = agree_topology(store, info, ParallelConfig())
    groups = initialize(store, info, topology, device=cpu, timeout_s=60)
    model = GPT(resolve_model(folder).config, groups, dtype=torch.float32, device=cpu)
    for weight in model.weights().values():
        torch.nn.init.normal_(weight, std=0.2)
    tokens = torch.randint(0, 250, (13,))
    with torch.inference_mode():
        run = model.begin(tokens, torch.arange(13), Averaging())
        whole = model.gpt.decoder(
            hidden_states=run.hidden_T1C,
            attention_mask=None,
            rotary_pos_emb=run.rope,
            packed_seq_params=run.carrier,
        )
    for end in range(1, model.num_layers + 1):
        model.advance(run, end)
    sliced = model.finish(run)
    plain = {n: model.forward(tokens[:n], tokens[:n], ROWS[:n], Averaging()) for n in (1, 3, 13)}
    model.pack()
    packed = {n: model.forward(tokens[:n], tokens[:n], ROWS[:n], Averaging()) for n in plain}
    none = model.logits(sliced[:0])
    left = {name for name, weight in model.weights().items() if not weight.is_meta}
    finalize()
    apart = max((packed[n] - plain[n]).abs().max().item() for n in plain)
    return {
        "equal": torch.equal(whole, sliced),
        "finite": bool(whole.isfinite().all()),
        "apart": apart / max(logits.abs().max().item() for logits in plain.values()),
        "empty": tuple(none.shape),
        "vocabulary": model.vocab_size,
        "left": {name for name in left if "norm" not in name},
    }


def test_slices_of_layers_and_packed_weights_do_what_megatrons_loop_does():
    (found,) = run_ranks(layers_on_rank, 1, free_port(), "sps2-tiny")
    assert found["equal"] and found["finite"]
    assert found["apart"] < 1e-5
    assert found["empty"] == (0, found["vocabulary"])
    if can_pack(torch.float32, torch.device("cpu")):
        assert found["left"] == {"embedding.word_embeddings.weight"}
