"""Activation of the MLP: kind, gate, and which of them Megatron's fused kernels change.

Megatron's fused bias + GELU kernels, gated or not, compute the tanh approximation, and they know
neither clamp nor offset. On other activations Megatron itself refuses fusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sps2_mega.checkpoint.megatron.settings.table import of_bridge, short
from sps2_mega.checkpoint.megatron.settings.values import number, refuse
from sps2_mega.errors import ConfigError

_KINDS = {
    "gelu": "gelu",
    "fast_gelu": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
    "relu2": "squared_relu",
    "squared_relu": "squared_relu",
    "quick_gelu": "quick_gelu",
}
_PARTIAL_GELU = "partial gelu"  # the function itself, which Megatron does not fuse in this form
_SWITCHES = ("swiglu", "squared_relu", "quick_geglu")
_MODULES = (
    "torch.nn.functional",
    "torch._C._nn",
    "megatron.core.activations",
    "megatron.core.fusions.fused_bias_geglu",
)


def activation_fields(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields `activation`, `activation_clamp` and `glu_linear_offset` of ModelConfig.

    Raises:
        ConfigError: the activation, or fusion with it, is not supported.
    """
    if of_bridge(args):
        kind, gated, fusion = _of_core(args, where)
    else:
        kind, gated, fusion = _of_arguments(args, where)
    fused = bool(args.get(fusion, fusion != "bias_activation_fusion"))
    bias = bool(args.get("add_bias_linear", True))
    if fusion == "bias_gelu_fusion" and not bias:
        fused = False  # Megatron-LM switches it off
    clamp = number(args, ("activation_func_clamp_value",), where)
    offset = number(args, ("glu_linear_offset",), where) or 0.0
    if fused:
        if not (kind == "gelu" and (gated or bias)) and not (kind == "silu" and gated):
            why = f"Megatron has no fused kernel for {_switch(args)}"
            raise refuse(where, fusion, True, why)
        if clamp is not None or offset:
            name = "activation_func_clamp_value" if clamp is not None else "glu_linear_offset"
            raise refuse(where, name, args[name], f"{fusion} computes without it")
        if kind == "gelu":
            kind = "gelu_tanh"
    if kind == _PARTIAL_GELU:
        kind = "gelu"
    if args.get("openai_gelu") and kind != "gelu_tanh" and not of_bridge(args):
        why = "it has no effect in megatron-core, and means tanh before"
        raise refuse(where, "openai_gelu", True, why)
    if not gated:
        return {"activation": kind}
    return {
        "activation": f"{kind}_gated",
        "activation_clamp": clamp,
        "glu_linear_offset": offset,
    }


def activation_to_args(activation: str, *, bias: bool) -> dict[str, Any]:
    """Megatron-LM's switches for an activation; all off where it has none for it."""
    return {
        "swiglu": activation == "silu_gated",
        "squared_relu": activation == "squared_relu",
        "quick_geglu": activation == "quick_gelu_gated",
        "openai_gelu": False,
        "bias_gelu_fusion": activation == "gelu_tanh" and bias,
        "bias_swiglu_fusion": False,
    }


def _of_arguments(args: Mapping[str, Any], where: str) -> tuple[str, bool, str]:
    switches = [name for name in _SWITCHES if args.get(name)]
    if len(switches) > 1:
        raise ConfigError(f"{where}: {' and '.join(switches)} exclude each other")
    match switches:
        case ["swiglu"]:
            return "silu", True, "bias_swiglu_fusion"
        case ["squared_relu"]:
            return "squared_relu", False, "bias_gelu_fusion"
        case ["quick_geglu"]:
            return "quick_gelu", True, "bias_gelu_fusion"
    return "gelu", False, "bias_gelu_fusion"


def _switch(args: Mapping[str, Any]) -> str:
    """The setting that chose the activation, for a message."""
    if of_bridge(args):
        gated = bool(args.get("gated_linear_unit", False))
        return f"activation_func={short(args['activation_func'])} with gated_linear_unit={gated}"
    return next((name for name in _SWITCHES if args.get(name)), "add_bias_linear=False")


def _of_core(args: Mapping[str, Any], where: str) -> tuple[str, bool, str]:
    kind = _kind(args["activation_func"])
    if kind is None:
        known = ", ".join(_KINDS)
        raise refuse(where, "activation_func", args["activation_func"], f"known are {known}")
    return kind, bool(args.get("gated_linear_unit", False)), "bias_activation_fusion"


def _kind(function: Any) -> str | None:
    """Kind of a function as run_config.yaml writes it: a name, or a mapping with `_target_`."""
    options: dict[str, Any] = {}
    if isinstance(function, Mapping):
        options = {k: v for k, v in function.items() if k not in ("_target_", "_call_")}
        function = function.get("_target_")
    if not isinstance(function, str):
        return None
    module, _, name = function.rpartition(".")
    if module and module not in _MODULES:
        return None
    kind = _KINDS.get(name)
    # A partial function has `_partial_`, positional `_args_` and its named arguments.
    partial, positional = options.pop("_partial_", False), options.pop("_args_", [])
    if not options and not positional:
        return kind
    approximate = options.pop("approximate", None)
    if kind != "gelu" or not partial or options or positional:
        return None
    return {"tanh": "gelu_tanh", "none": _PARTIAL_GELU}.get(approximate)
