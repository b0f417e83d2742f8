"""Oracle: megatron-core's own GPTModel, built from the settings of a run and run on the CPU.

The translation of settings is Megatron-LM's and Megatron-Bridge's (their `gpt_builder`s and
`provide`), written down again here and independent of the product's. Layers are those of the local
specification, attention is megatron-core's own. What a CPU lacks is replaced: the current device,
the random state of dropout, and the device of masks.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

# One rank in float32, without kernels that only CUDA has.
FORCED: dict[str, Any] = dict(
    tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1,
    virtual_pipeline_model_parallel_size=None, expert_model_parallel_size=1,
    expert_tensor_parallel_size=1, sequence_parallel=False, fp16=False, bf16=False,
    params_dtype=torch.float32, pipeline_dtype=torch.float32, use_cpu_initialization=True,
    perform_initialization=False, persist_layer_norm=False, masked_softmax_fusion=False,
    apply_rope_fusion=False, gradient_accumulation_fusion=False,
)  # fmt: skip


def stock_logits(settings: Mapping[str, Any], *, bridge: bool, tokens: list[int]) -> Any:
    """Logits [T, vocab] of random weights, and these weights by name; needs parallel state.

    Raises whatever Megatron raises on settings that it does not run.
    """
    model, (logits,) = stock_run(settings, bridge=bridge, prompts=[tokens])
    return logits, {name: parameter.detach() for name, parameter in model.named_parameters()}


def stock_run(
    settings: Mapping[str, Any], *, bridge: bool, prompts: list[list[int]]
) -> tuple[Any, list[torch.Tensor]]:
    """A model with random weights and its logits [T, vocab] of every prompt, as `stock_logits`."""
    with cpu_as_device():
        model = (_bridge_model if bridge else _megatron_lm_model)(settings).float().eval()
        random_weights(model)
        with torch.inference_mode():
            logits = [
                model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0].clone()
                for tokens in prompts
            ]
    return model, logits


def random_weights(model: torch.nn.Module) -> None:
    """Fill the model so that every parameter changes the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3 if parameter.dim() > 1 else 0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)


@contextlib.contextmanager
def cpu_as_device() -> Iterator[None]:
    """Megatron's stock modules on the CPU."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    initialize_rng_tracker(inference_rng_tracker=True)
    ones = torch.ones

    def ones_here(*args: Any, **options: Any) -> torch.Tensor:
        return ones(*args, **{k: v for k, v in options.items() if k != "device"})

    with (
        mock.patch("torch.cuda.current_device", lambda: torch.device("cpu")),
        mock.patch("torch.ones", ones_here),
    ):
        yield


def _transformer_config(settings: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    from megatron.core.transformer import TransformerConfig

    names = {field.name for field in fields(TransformerConfig)}
    taken = {name: value for name, value in settings.items() if name in names}
    forced = {name: value for name, value in FORCED.items() if name in names}
    return TransformerConfig(**(taken | dict(own) | forced))


def _gpt(config: Any, settings: Mapping[str, Any], qk_l2_norm: bool, **options: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=qk_l2_norm,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        position_embedding_type=settings.get("position_embedding_type", "learned_absolute"),
        rotary_percent=settings.get("rotary_percent", 1.0),
        rotary_base=settings.get("rotary_base", 10000),
        **options,
    )


def _megatron_lm_model(args: Mapping[str, Any]) -> Any:
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    own: dict[str, Any] = {
        "activation_func": F.gelu,
        "gated_linear_unit": False,
        "bias_activation_fusion": args["bias_gelu_fusion"] and args["add_bias_linear"],
        "layernorm_epsilon": args["norm_epsilon"],
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
        "layernorm_zero_centered_gamma": args.get("apply_layernorm_1p", False),
    }
    if args["swiglu"]:
        own |= dict(activation_func=F.silu, gated_linear_unit=True)
        own |= dict(bias_activation_fusion=args["bias_swiglu_fusion"])
    if args.get("squared_relu"):
        assert not args["swiglu"]
        own |= dict(activation_func=squared_relu)
    elif args.get("quick_geglu"):
        assert not args["swiglu"]
        own |= dict(activation_func=quick_gelu, gated_linear_unit=True)
    settings = dict(args)
    if settings.get("use_rotary_position_embeddings"):
        settings["position_embedding_type"] = "rope"
    config = _transformer_config(settings, own)
    if settings["position_embedding_type"] == "yarn":
        _set_yarn(config, {
            "rotary_scaling_factor": (args.get("rotary_scaling_factor"), 1.0),
            "original_max_position_embeddings": (
                args.get("yarn_original_max_position_embeddings"), 4096
            ),
            "beta_fast": (args.get("yarn_beta_fast"), 32.0),
            "beta_slow": (args.get("yarn_beta_slow"), 1.0),
            "mscale": (args.get("mscale"), 1.0),
            "mscale_all_dim": (args.get("mscale_all_dim"), 0.0),
            "correction_range_round_to_int": (
                args.get("yarn_correction_range_round_to_int"), True
            ),
        })  # fmt: skip
    return _gpt(
        config,
        settings,
        args.get("qk_l2_norm", False),
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        rope_scaling=args.get("use_rope_scaling", False),
        seq_len_interpolation_factor=args.get("rotary_seq_len_interpolation_factor"),
    )


def _bridge_model(section: Mapping[str, Any]) -> Any:
    own = {"activation_func": instantiate(section["activation_func"])}
    config = _transformer_config(section, own)
    for name, value in section.items():
        if name.startswith("yarn_"):
            setattr(config, name, value)
    vocab = section["vocab_size"]
    if section.get("should_pad_vocab"):
        multiple = section["make_vocab_size_divisible_by"]
        vocab = math.ceil(vocab / multiple) * multiple
    model = _gpt(
        config,
        section,
        False,  # Bridge does not hand it on
        vocab_size=vocab,
        max_sequence_length=section["seq_length"],
        share_embeddings_and_output_weights=section["share_embeddings_and_output_weights"],
        rope_scaling=section.get("rope_scaling", False),
        rope_scaling_factor=section.get("rope_scaling_factor", 1.0),
        seq_len_interpolation_factor=section.get("seq_len_interpolation_factor"),
    )
    if section.get("scale_factor") is not None:  # what providers of Llama 3.1 did before 0.3.1
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=section["scale_factor"],
            low_freq_factor=section["low_freq_factor"],
            high_freq_factor=section["high_freq_factor"],
            original_max_position_embeddings=section["old_context_len"],
        )
    return model


def _set_yarn(config: Any, values: dict[str, tuple[Any, Any]]) -> None:
    for name, (value, default) in values.items():
        setattr(config, f"yarn_{name}", default if value is None else value)


def instantiate(described: Any) -> Any:
    """The function that a run_config.yaml describes."""
    if isinstance(described, str):
        described = {"_target_": described}
    module, _, name = described["_target_"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    options = {name: value for name, value in described.items() if not name.startswith("_")}
    return partial(function, **options) if described.get("_partial_") else function
