"""The table of settings: it covers the installed Megatron, and what it refuses is named."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sps2_mega.checkpoint.megatron.settings.arguments import model_config_from_args
from sps2_mega.checkpoint.megatron.settings.bridge import bridge_args
from sps2_mega.checkpoint.megatron.settings.harmless_model import MODEL
from sps2_mega.checkpoint.megatron.settings.harmless_training import TRAINING
from sps2_mega.checkpoint.megatron.settings.refused import REFUSED
from sps2_mega.checkpoint.megatron.settings.run import RUN
from sps2_mega.checkpoint.megatron.settings.table import SETTINGS, check_settings, treated_settings
from sps2_mega.config import RopeConfig
from sps2_mega.errors import ConfigError

REAL_RUN = json.loads((Path(__file__).parent / "megatron_lm_0.19.2.json").read_text())
"""Arguments that Megatron-LM 0.19.2 parsed and stored with a checkpoint."""

CONFIG_FILES = ("transformer/transformer_config.py", "model_parallel_config.py")
ARGUMENT_GROUPS = {  # dataclasses whose fields Megatron-LM makes arguments of
    "CheckpointConfig", "DistributedInitConfig", "FaultInjectorConfig", "InferenceSetupConfig",
    "LoggerConfig", "ProfilingConfig", "RNGConfig", "RerunStateMachineConfig", "SchedulerConfig",
    "StragglerDetectionConfig", "TokenizerConfig", "TrainingConfig", "ValidationConfig",
}  # fmt: skip
RENAMED = {  # fields that get another name as arguments
    "fault_delay", "fault_probabilities", "fault_types", "delay_start_iteration",
    "mtti_seconds", "num_ranks", "offset_seconds", "ranks",
    "check_for_nan_in_loss", "use_nsys_profiler",
}  # fmt: skip


def megatron(package: str) -> Path | None:
    """Folder of an installed package of Megatron, which is not imported."""
    spec = find_spec("megatron")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((Path(f) / package for f in folders if (Path(f) / package).is_dir()), None)


def dataclass_fields(path: Path) -> Iterator[tuple[str, str]]:
    """(class, field) of the classes of a module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    yield node.name, statement.target.id


def added_arguments(path: Path) -> Iterator[str]:
    """Names in the namespace of the arguments that a module adds to a parser."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flags = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            given = {key.arg: key.value for key in node.keywords}
            dest = given.get("dest")
            if isinstance(dest, ast.Constant):
                yield dest.value
            elif long := [flag for flag in flags if flag.startswith("--")]:
                yield long[0].removeprefix("--").replace("-", "_")


def test_every_field_of_the_installed_megatron_core_is_in_the_table():
    core = megatron("core")
    assert core is not None
    found = {name for file in CONFIG_FILES for _, name in dataclass_fields(core / file)}
    assert len(found) > 200
    assert sorted(found - set(SETTINGS)) == []


def test_every_argument_of_the_installed_megatron_lm_is_in_the_table():
    training = megatron("training")
    if training is None:
        pytest.skip("this release of megatron-core has no megatron.training in its wheel")
    found = set(added_arguments(training / "arguments.py"))
    for path in (training / "config").glob("*.py"):
        found |= {name for group, name in dataclass_fields(path) if group in ARGUMENT_GROUPS}
    assert len(found) > 500
    assert sorted(found - set(SETTINGS) - RENAMED) == []


def test_no_name_is_in_two_lists():
    lists = [list(RUN), list(REFUSED), *(names.split() for names in (MODEL | TRAINING).values())]
    names = [name for one in lists for name in one]
    assert sorted(names) == sorted(set(names))
    assert len(SETTINGS) == len(names) > 1000


def test_the_arguments_of_a_real_run_are_read():
    assert sorted(set(REAL_RUN) - set(SETTINGS)) == []
    config = model_config_from_args(REAL_RUN, "args")
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 8, 2)
    assert (config.activation, config.norm_eps) == ("silu_gated", 1e-5)
    assert config.rope == RopeConfig(theta=50000.0)


def test_what_is_not_default_in_a_real_run_is_told():
    treated = {name: (value, how) for name, value, how in treated_settings(REAL_RUN)}
    assert len(treated) < 30
    assert treated["rotary_base"] == (50000, "run: rope.theta")
    assert treated["add_bias_linear"] == (False, "run: linear_bias")
    assert treated["world_size"][1].startswith("harmless: ")
    assert "lr" not in treated
    refused = treated_settings(REAL_RUN | {"num_experts": 8, "of_tomorrow": 2, "onnx_safe": False})
    assert ("num_experts", 8, "refused: mixtures of experts are not run") in refused
    assert ("of_tomorrow", 2, "refused: the setting is not known") in refused
    assert "onnx_safe" not in {name for name, _, _ in refused}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_setting_is_named_unless_it_has_no_effect(name: str):
    for value in REFUSED[name][0]:
        check_settings({name: value}, "args")
    for value in (True, 3, "other", [1]):
        if value not in REFUSED[name][0]:
            with pytest.raises(ConfigError) as caught:
                check_settings({name: value}, "args")
            message = str(caught.value)
            assert message.startswith(f"args: {name}={value!r} is not supported: ")
            assert "\n" not in message


def test_an_unknown_setting_must_be_off():
    for value in (None, False, 0, 0.0, "", [], (), {}):
        check_settings({"of_tomorrow": value}, "args")
    with pytest.raises(ConfigError, match=r"args: of_tomorrow=0\.5 is not supported"):
        check_settings({"of_tomorrow": 0.5}, "args")
    with pytest.raises(ConfigError, match=r"of_tomorrow='x+\.\.\. is not") as caught:
        check_settings({"of_tomorrow": "x" * 5000}, "args")
    assert len(str(caught.value)) < 200


SECTION: dict[str, Any] = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 128,
    "seq_length": 256,
    "normalization": "RMSNorm",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
    "attention_backend": {"_args_": [5], "_call_": True, "_name_": "auto", "_target_": "x.Attn"},
    "init_method": {"_target_": "torch.nn.init.normal_", "_partial_": True, "std": 0.02},
}
OLD_LLAMA3: dict[str, Any] = {  # of providers before 0.3.1
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama32ModelProvider1B",
    "scale_factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def read_bridge(**changes: Any):
    return model_config_from_args(bridge_args({"model": SECTION | changes}, "yaml"), "yaml")


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({}, "rope", RopeConfig(theta=5e5)),
        ({}, "activation", "silu_gated"),
        ({}, "dtype", "bfloat16"),
        ({"bf16": False, "params_dtype": "torch.float32"}, "dtype", "float32"),
        (
            {"rope_scaling": True, "rope_scaling_factor": 32.0},
            "rope",
            RopeConfig(theta=5e5, scaling="llama3", factor=32.0, **LLAMA3),
        ),
        (OLD_LLAMA3, "rope", RopeConfig(theta=5e5, scaling="llama3", factor=32.0, **LLAMA3)),
        (
            {"seq_len_interpolation_factor": 4.0},
            "rope",
            RopeConfig(theta=5e5, scaling="linear", factor=4.0),
        ),
        ({"rotary_percent": 0.5}, "rope", RopeConfig(theta=5e5, rotary_dim=8)),
        ({"rotary_interleaved": True}, "rope", RopeConfig(theta=5e5, interleaved=True)),
        ({"no_rope_freq": 2}, "no_rope_layers", (1,)),
        ({"softmax_scale": 0.5}, "softmax_scale", 0.5),
        ({"activation_func_clamp_value": 7.0}, "activation_clamp", 7.0),
        ({"glu_linear_offset": 1}, "glu_linear_offset", 1.0),
        ({"window_size": [127, 0]}, "sliding_window", 128),
        ({"window_size": [127, 0], "window_attn_skip_freq": 1}, "sliding_window", None),
        ({"num_query_groups": None}, "num_kv_heads", 4),
    ],
)
def test_bridge_settings_are_run(changes: dict[str, Any], field: str, value: Any):
    assert getattr(read_bridge(**changes), field) == value


def test_a_config_with_a_transformer_inside_is_the_same():
    inner = {
        name: value for name, value in SECTION.items() if name not in ("vocab_size", "_target_")
    }
    outer = {name: inner.pop(name) for name in ("seq_length", "position_embedding_type")}
    outer |= {"rotary_base": inner.pop("rotary_base"), "vocab_size": 128}
    outer |= {"_target_": "megatron.training.models.gpt.GPTModelConfig", "transformer": inner}
    inner["_target_"] = "megatron.bridge.models.transformer_config.TransformerConfig"
    assert model_config_from_args(bridge_args({"model": outer}, "yaml"), "yaml") == read_bridge()
    # What megatron-core 0.19.2's GPTModelConfig.as_dict adds, and what it leaves out.
    outer |= dict(
        _builder_="megatron.training.models.gpt.GPTModelBuilder",
        extra_checkpoint_metadata=None, fp16_lm_cross_entropy=False, parallel_output=True,
        restore_modelopt_state=False, scatter_embedding_sequence_parallel=True,
        tp_comm_overlap_cfg=None, transformer_layer_spec=None, use_arbitrary_attention_mask=None,
    )  # fmt: skip
    assert model_config_from_args(bridge_args({"model": outer}, "yaml"), "yaml") == read_bridge()
    without = {name: value for name, value in inner.items() if name != "activation_func"}
    with pytest.raises(ConfigError, match=r"yaml: activation_func is not stated .* --config"):
        bridge_args({"model": outer | {"transformer": without}}, "yaml")
    with pytest.raises(ConfigError, match=r"_builder_='megatron\.x\.HybridModelBuilder'"):
        bridge_args({"model": outer | {"_builder_": "megatron.x.HybridModelBuilder"}}, "yaml")
    inner["_target_"] = "megatron.core.transformer.transformer_config.MLATransformerConfig"
    with pytest.raises(ConfigError, match=r"_target_=.*MLATransformerConfig"):
        bridge_args({"model": outer}, "yaml")


def partial_of(function: str, **options: Any) -> dict[str, Any]:
    return {"_target_": function, "_partial_": True, "_args_": [], **options}


@pytest.mark.parametrize(
    ("function", "fused", "activation"),
    [
        ("torch._C._nn.gelu", False, "gelu"),
        ("torch._C._nn.gelu", True, "gelu_tanh"),
        ("gelu", False, "gelu"),
        (partial_of("torch._C._nn.gelu", approximate="tanh"), False, "gelu_tanh"),
        (partial_of("torch._C._nn.gelu", approximate="none"), False, "gelu"),
        ("megatron.core.activations.fast_gelu", False, "gelu_tanh"),
        ("megatron.core.activations.squared_relu", False, "squared_relu"),
        ("megatron.core.fusions.fused_bias_geglu.quick_gelu", False, "quick_gelu"),
        ("torch.nn.functional.relu", False, "relu"),
        ("torch.nn.functional.silu", False, "silu"),
    ],
)
def test_an_activation_is_known_by_its_exact_kind(function: Any, fused: bool, activation: str):
    changes = dict(activation_func=function, bias_activation_fusion=fused, add_bias_linear=True)
    assert read_bridge(gated_linear_unit=False, **changes).activation == activation
    assert read_bridge(gated_linear_unit=True, **changes).activation == f"{activation}_gated"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_moe_experts": 8},
        {"qk_l2_norm": True},
        {"attention_chunk_size": 8192},
        {"use_mup": True},
        {"multi_latent_attention": True},
        {"rope_scaling_factor": None, "rope_scaling": True},
        {"seq_len_interpolation_factor": 2.0, "rope_scaling": True, "rope_scaling_factor": 8.0},
        {"_target_": "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"},
        {"_target_": "megatron.bridge.models.qwen_vl.qwen25_vl_provider.Qwen25VLModelProvider"},
        {"_target_": "megatron.bridge.models.llama.llama4_provider.Llama4ModelProvider"},
        {"transformer_layer_spec": {"_target_": "mine.layer_spec", "_call_": False}},
        {"activation_func": {"_target_": "torch.nn.functional.sigmoid", "_call_": False}},
        {"activation_func": {"_target_": "mine.silu", "_call_": False}},
        {"activation_func": partial_of("torch._C._nn.gelu", approximate="other")},
        {"activation_func": partial_of("torch.nn.functional.silu", inplace=True)},
        {"activation_func_clamp_value": 7.0, "bias_activation_fusion": True},
        {"glu_linear_offset": 1.0, "bias_activation_fusion": True},
        {"window_size": [127, 0], "window_attn_skip_freq": 2},
        {"window_size": [-1, 0]},
        {"num_query_groups": 3},
        {"num_query_groups": "2"},
        {"rotary_base": "10000"},
        {"rotary_base": 10**400},
        {"rotary_base": 0},
        {"kv_channels": 15},
        {"layernorm_epsilon": -1.0},
        {"rotary_percent": 0.2},
        {"softmax_scale": float("nan")},
        {"no_rope_freq": 3},
        {"position_embedding_type": "none"},
        {"position_embedding_type": "yarn"},
        {"swiglu": True},
        {"scale_factor": 8.0},
        OLD_LLAMA3 | {"high_freq_factor": 1.0},
        OLD_LLAMA3 | {"rope_scaling": True, "rope_scaling_factor": 8.0},
        {"layernorm_epsilon": 1e-5, "norm_epsilon": 1e-6},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_bridge_settings_are_refused_by_name(changes: dict[str, Any]):
    with pytest.raises(ConfigError) as caught:
        read_bridge(**changes)
    message = str(caught.value)
    assert message.startswith("yaml: ")
    assert any(name in message for name in changes)
    assert "\n" not in message


YARN: dict[str, Any] = {
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 64,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": True,
}


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 1.1386294361119891),  # 0.1 * ln 4 + 1
        ({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}, 1.1386294361119891),
        ({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 1.0}, 1.0),
        ({"yarn_rotary_scaling_factor": 1.0}, 1.0),
    ],
)
def test_yarn_of_bridge_is_run_with_its_own_parameters(changes: dict[str, Any], factor: float):
    rope = read_bridge(**(YARN | changes)).rope
    assert rope is not None
    assert rope.attention_factor == pytest.approx(factor)
    assert (rope.scaling, rope.truncate, rope.original_max_position_embeddings) == (
        "yarn",
        True,
        64,
    )


@pytest.mark.parametrize("missing", [name for name in YARN if "mscale" not in name][1:5])
def test_yarn_of_bridge_needs_its_numbers(missing: str):
    with pytest.raises(ConfigError, match=missing):
        read_bridge(**(YARN | {missing: None}))
