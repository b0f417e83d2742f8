"""Members of Megatron's enums, which are pickled by value: what a stored value is called.

Values are those of megatron-core 0.16 to 0.19, and no two of these releases contradict each other.
`LayerType`, whose values differ in earlier ones, is left out: it stays `LayerType(3)`.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

_ENUMS = "megatron.core.transformer.enums"
_GRAPH_PARTS = "attn mlp moe moe_router moe_preprocess mamba"


def _numbered(names: str) -> dict[object, str]:
    return dict(enumerate(names.split(), start=1))


MEMBERS: Mapping[str, Mapping[object, str]] = {
    "megatron.core.enums.ModelType": _numbered("encoder_or_decoder"),
    f"{_ENUMS}.ModelType": _numbered("encoder_or_decoder"),
    f"{_ENUMS}.AttnType": _numbered("self_attn cross_attn"),
    f"{_ENUMS}.AttnMaskType": _numbered(
        "padding causal no_mask padding_causal arbitrary causal_bottom_right"
    ),
    f"{_ENUMS}.AttnBackend": _numbered("flash fused unfused local auto"),
    f"{_ENUMS}.CudaGraphModule": _numbered(_GRAPH_PARTS),
    f"{_ENUMS}.CudaGraphScope": _numbered(
        f"full_iteration {_GRAPH_PARTS} full_iteration_inference"
    ),
    f"{_ENUMS}.InferenceCudaGraphScope": _numbered("none layer block"),
    "megatron.training.checkpointing.CheckpointType": _numbered(
        "LEGACY LOCAL GLOBAL TORCH_DCP FSDP_DTENSOR"
    ),
    "signal.Signals": {number.value: number.name for number in signal.Signals},
}

_INFERENCE = "megatron.core.inference.config"
TEXTS = frozenset(
    [
        "megatron.core.enums.Fp8Recipe",
        "megatron.core.enums.Fp4Recipe",
        f"{_INFERENCE}.AsyncScheduleMode",
        f"{_INFERENCE}.CudaGraphSizingDistribution",
        f"{_INFERENCE}.KVCacheManagementMode",
        f"{_INFERENCE}.PrefixCachingCoordinatorPolicy",
        f"{_INFERENCE}.PrefixCachingEvictionPolicy",
        "megatron.core.inference.moe.InferenceGroupedGemmBackend",
    ]
)
"""Enums whose values are texts: the values that command lines and configurations hold."""
