"""Cells of the table: formats, parallel shapes and settings of training runs, as pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sps2_mega.config import ModelConfig, RopeConfig

RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
# (tp, sp) of the jobs that read every folder.
READERS = ((1, 1), (2, 1), (3, 1), (1, 2))
TOLERANCE = 1e-4
LENGTHS = (1, 17, 50)

# Cut by 2 and by 3; the vocabulary by neither, so that there are padding rows. Four layers make two
# stages of two model chunks. Matrices of this deviation give logits of about 1.
MODEL = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=72,
    num_heads=12,
    num_kv_heads=6,
    head_dim=8,
    vocab_size=131,
    max_position_embeddings=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=50000.0),
    dtype="float32",
)
STD = 0.12


@dataclass(frozen=True)
class Shape:
    """Ranks of a training run; `vpp` is the number of model chunks of a pipeline stage."""

    tp: int
    pp: int
    vpp: int = 1
    dp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        chunks = f", VPP {self.vpp}" if self.vpp > 1 else ""
        return f"{self.tp} x {self.pp}{chunks}" + (f", DP {self.dp}" if self.dp > 1 else "")


ONE, TP2, TP3, PP2, GRID = Shape(1, 1), Shape(2, 1), Shape(3, 1), Shape(1, 2), Shape(2, 2)
VPP, GRID_VPP = Shape(1, 2, 2), Shape(2, 2, 2)


@dataclass(frozen=True)
class Format:
    """A writer, its options, and the shapes it is run at; `refused` is what a refusal must name."""

    title: str
    module: str
    function: str
    shapes: tuple[Shape, ...]
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None


_CORE, _OTHER = "dist.checkpoint.checkpoint_writer", "dist.checkpoint.checkpoint_kinds"
_DCP, _BRIDGE = "write_torch_dcp", "write_bridge"
FORMATS = {
    "stacked": Format(
        "`torch_dist`, layers stacked",
        _CORE, "write_torch_dist", (ONE, TP2, TP3, PP2, GRID, VPP, GRID_VPP),
    ),
    "numbered": Format(
        "`torch_dist`, layers numbered",
        _CORE, "write_torch_dist", (TP2, GRID, VPP), {"non_homogeneous_layers": True},
    ),
    "singleton": Format(
        "`torch_dist`, `singleton_local_shards`",
        _CORE, "write_torch_dist", (TP2, GRID), {"singleton_local_shards": True},
    ),
    "torch_dcp": Format(
        "`torch_dcp`, FSDP2",
        _OTHER, _DCP, (ONE, Shape(1, 1, dp=2), Shape(1, 1, dp=3)), {"fsdp": True},
    ),
    "torch_dcp plain": Format("`torch_dcp`, unsharded", _OTHER, _DCP, (ONE,)),
    "legacy": Format(
        "legacy `mp_rank_*`",
        _CORE, "write_legacy", (ONE, TP2, TP3, PP2, GRID, VPP, GRID_VPP),
    ),
    "bridge": Format("Megatron Bridge", _OTHER, _BRIDGE, (ONE, TP3, GRID, VPP)),
    "fsdp_dtensor": Format(
        "`fsdp_dtensor`",
        _OTHER, _DCP, (Shape(1, 1, dp=2),), {"fsdp": True, "ckpt_format": "fsdp_dtensor"},
        refused="fsdp_dtensor",
    ),
    "bridge fsdp_dtensor": Format(
        "Megatron Bridge, `fsdp_dtensor`",
        _OTHER, _BRIDGE, (Shape(1, 1, dp=2),), {"ckpt_format": "fsdp_dtensor"},
        refused="fsdp_dtensor",
    ),
    "torch_dcp of several ranks": Format(
        "`torch_dcp` of several TP ranks", _OTHER, _DCP, (TP2,), refused="torch_dcp",
    ),
}  # fmt: skip

_ARGUMENTS: dict[str, Any] = dict(
    num_layers=2, hidden_size=48, ffn_hidden_size=72, num_attention_heads=12, kv_channels=8,
    group_query_attention=True, num_query_groups=6, padded_vocab_size=256, vocab_size=131,
    make_vocab_size_divisible_by=128, max_position_embeddings=64, normalization="RMSNorm",
    norm_epsilon=1e-5, swiglu=True, bias_gelu_fusion=True, bias_swiglu_fusion=True,
    add_bias_linear=False, add_qkv_bias=False, position_embedding_type="rope", rotary_base=10000,
    rotary_percent=1.0, untie_embeddings_and_output_weights=True, hidden_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
# Settings without a form in Hugging Face's families of ours: the oracle is megatron-core itself.
SETTINGS: dict[str, dict[str, Any]] = {
    "`qk_l2_norm`": dict(qk_l2_norm=True),
    "`softmax_scale: 0.05`": dict(softmax_scale=0.05),
    "`activation_func_clamp_value: 0.5`": dict(
        activation_func_clamp_value=0.5, bias_swiglu_fusion=False
    ),
    "`quick_geglu`, `glu_linear_offset: 1.0`": dict(
        swiglu=False, quick_geglu=True, bias_gelu_fusion=False, glu_linear_offset=1.0
    ),
    "`rotary_interleaved`, `rotary_percent: 0.5`": dict(
        rotary_interleaved=True, rotary_percent=0.5
    ),
    "`no_rope_freq: [0, 1]`": dict(no_rope_freq=[0, 1]),
    "`squared_relu`": dict(swiglu=False, squared_relu=True, bias_gelu_fusion=False),
}


def arguments(name: str) -> dict[str, Any]:
    """Megatron-LM's arguments of a model with the settings of that name."""
    return _ARGUMENTS | SETTINGS[name]


def prompts() -> list[list[int]]:
    return [[(7 * i * i + 3 * i + 1) % MODEL.vocab_size for i in range(n)] for n in LENGTHS]


def places() -> list[tuple[str, Format, Shape, str]]:
    """(name of the format, format, shape, folder below a release's) of every folder."""
    return [
        (name, kind, shape, f"{name} {shape}".replace(",", "").replace(" ", "_"))
        for name, kind in FORMATS.items()
        for shape in kind.shapes
    ]


def settings_folder(name: str) -> str:
    return f"settings_{list(SETTINGS).index(name)}"
