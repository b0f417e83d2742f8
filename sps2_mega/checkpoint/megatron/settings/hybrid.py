"""Layers of megatron-core's HybridModel as layers of a GPT: patterns of attention and MLP alone.

HybridModel (MambaModel before 0.18) numbers every sublayer, by a pattern with one symbol each:
`*-*-` has attention, MLP, attention, MLP, which is a GPT of two layers. A GPT layer of ours takes
an attention and the MLP after it; where the pattern has only one of them, as in `**-`, the other
has zeros for weights and adds nothing. Patterns with other symbols are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sps2_mega.checkpoint.megatron.settings.table import is_empty
from sps2_mega.checkpoint.megatron.settings.values import refuse
from sps2_mega.errors import CheckpointError

_LAYERS = "decoder.layers."
_KINDS = {
    "M": "Mamba",
    "G": "gated delta net",
    "D": "sparse attention (DSA)",
    "+": "latent attention (MLA)",
    "E": "experts",
    "/": "multi-token prediction",
}
_ATTENTION, _MLP, _STAGE = "*", "-", "|"
_OF_ATTENTION = ("self_attention.", "input_layernorm.")
_OF_MLP = ("mlp.", "pre_mlp_layernorm.")
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")
_RATIOS = ("hybrid_attention_ratio", "hybrid_mlp_ratio")
_SPEC_MODULES = (
    "megatron.core.models.hybrid.hybrid_layer_specs",
    "megatron.core.models.mamba.mamba_layer_specs",
)
_SPECS = ("hybrid_stack_spec", "mamba_stack_spec")
# HybridModel builds its layers without these, or counts sublayers for them.
_NOT_IN_HYBRIDS = (
    *("qk_layernorm", "qk_l2_norm", "use_rope_scaling", "rope_scaling"),
    *("no_rope_freq", "window_attn_skip_freq", "window_size", "rotary_interleaved"),
)


@dataclass(frozen=True, slots=True)
class HybridPattern:
    """Sublayers in order: per sublayer its GPT layer and whether it is an attention."""

    sublayers: tuple[tuple[int, bool], ...]

    @property
    def num_layers(self) -> int:
        return self.sublayers[-1][0] + 1

    def canonical(self, name: str) -> str:
        """Name of a weight in the GPT; `name` is canonical but for the numbers of layers.

        Raises:
            CheckpointError: the pattern has no such weight.
        """
        if name.startswith("decoder.final_norm."):
            return name.replace("final_norm", "final_layernorm")
        if not name.startswith(_LAYERS):
            return name
        number, _, part = name.removeprefix(_LAYERS).partition(".")
        index = int(number) if number.isdecimal() else len(self.sublayers)
        if index < len(self.sublayers):
            layer, attention = self.sublayers[index]
            if part.startswith(_OF_ATTENTION if attention else _OF_MLP):
                return f"{_LAYERS}{layer}.{part}"
        raise CheckpointError(f"{name}: the hybrid layer pattern has no such weight")

    def absent(self, name: str) -> float | None:
        """Value of a canonical weight for which there is no sublayer; None if there is one."""
        if not name.startswith(_LAYERS):
            return None
        number, _, part = name.removeprefix(_LAYERS).partition(".")
        if (int(number), part.startswith(_OF_ATTENTION)) in self.sublayers:
            return None
        return 1.0 if part.endswith("layernorm.weight") else 0.0


def hybrid_pattern(args: Mapping[str, Any], where: str) -> HybridPattern | None:
    """Pattern of a run with a HybridModel; None of one with a GPTModel.

    Raises:
        ConfigError: it has other sublayers than attention and MLP, or settings that differ there.
    """
    stated = [name for name in _PATTERNS if not is_empty(args.get(name))]
    for name in (*_RATIOS, "is_hybrid_model"):
        if not stated and not is_empty(args.get(name)):
            why = "layers other than attention and MLP are not run"
            raise refuse(where, name, args[name], why)
    if not stated:
        return None
    pattern = args[stated[0]]
    if not isinstance(pattern, str):
        raise refuse(where, stated[0], pattern, "needs a text")
    symbols = pattern.replace(_STAGE, "")
    for symbol in symbols:
        if symbol not in (_ATTENTION, _MLP):
            kind = _KINDS.get(symbol, "which is unknown")
            why = f"sublayers {symbol!r} ({kind}) are not supported (needs '*' and '-' alone)"
            raise refuse(where, stated[0], pattern, why)
    for name in _NOT_IN_HYBRIDS:
        if not is_empty(args.get(name)):
            raise refuse(where, name, args[name], f"not with {stated[0]}={pattern!r}")
    return _paired(symbols)


def without_pattern(args: Mapping[str, Any], pattern: HybridPattern) -> dict[str, Any]:
    """Settings of the GPT that computes the same."""
    dropped = [*_PATTERNS, *_RATIOS, "is_hybrid_model"]
    if _is_own_spec(args.get("spec")):
        dropped.append("spec")
    kept = {name: value for name, value in args.items() if name not in dropped}
    return kept | {"num_layers": pattern.num_layers}


def _is_own_spec(spec: Any) -> bool:
    pair = isinstance(spec, (list, tuple)) and len(spec) == 2
    return pair and spec[0] in _SPEC_MODULES and spec[1] in _SPECS


def _paired(symbols: str) -> HybridPattern:
    sublayers: list[tuple[int, bool]] = []
    for symbol in symbols:
        attention = symbol == _ATTENTION
        layer, follows = sublayers[-1] if sublayers else (-1, False)
        # An MLP completes the layer of the attention right before it.
        sublayers.append((layer if follows and not attention else layer + 1, attention))
    return HybridPattern(tuple(sublayers))
