"""The `model` section of Megatron-Bridge's run_config.yaml, as one mapping of settings.

Bridge stores the fields of a provider, which is a TransformerConfig with those of GPTModel beside
them, or (since 0.6) of a GPTModelConfig that has a TransformerConfig inside, without the fields
that are functions: which activation was trained is then unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sps2_mega.checkpoint.megatron.settings.table import short
from sps2_mega.checkpoint.megatron.settings.values import refuse
from sps2_mega.errors import ConfigError

# Providers whose fields say all: they build megatron-core's GPTModel from them. Those of the old
# Llama 3.1 add rotary scaling, by fields of their own. The others (Gemma, vision, ...) compute
# something that no field states.
_PROVIDERS = re.compile(
    r"(GPT|(Code)?Llama(2|3|31|32)?|Mistral(Small3)?|Qwen(2|25|3)?)ModelProvider(\d\w*)?"
    r"|GPTProvider\d\w*|Llama31Nemotron(Nano8B|70B)Provider|GPTModelConfig"
)
_BUILDERS = ("GPTModelBuilder",)
_INNER = ("TransformerConfig",)
_SPECS = (
    "default_layer_spec",
    "transformer_engine_layer_spec",
    "transformer_engine_full_layer_spec",
    "local_layer_spec",
)
_SPEC_MODULES = ("megatron.bridge.models.gpt", "megatron.training.models.gpt")


def bridge_args(content: Any, where: str) -> dict[str, Any]:
    """Settings for `model_config_from_args` from a loaded run_config.yaml, under Bridge's names.

    Raises:
        ConfigError: there is no `model` section, or it builds something else than a plain GPT.
    """
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping):
        raise ConfigError(f"{where}: no `model` section")
    if content.get("peft") is not None:
        raise ConfigError(
            f"{where}: peft={short(content['peft'])} is not supported: the folder holds an "
            "adapter's weights; merge it into its base model with Bridge first"
        )
    fields = dict(model)
    _check_class("_target_", fields.pop("_target_", None), _PROVIDERS.fullmatch, where)
    _check_class("_builder_", fields.pop("_builder_", None), _BUILDERS.__contains__, where)
    inner = fields.pop("transformer", None)
    if isinstance(inner, Mapping):
        _check_class("_target_", inner.get("_target_"), _INNER.__contains__, where)
        fields = {name: value for name, value in inner.items() if name != "_target_"} | fields
    fields = {name: _number_of_text(value) for name, value in fields.items()}
    _check_spec(fields.pop("transformer_layer_spec", None), where)
    if fields.get("qk_l2_norm"):
        why = "Bridge does not hand it to the layers"
        raise refuse(where, "qk_l2_norm", True, why)
    if fields.get("activation_func") is None:
        raise ConfigError(
            f"{where}: activation_func is not stated (Bridge leaves functions out where it stores "
            "a GPTModelConfig): pass the architecture with --config NAME|FILE"
        )
    return fields  # in which activation_func tells the two vocabularies apart


def _number_of_text(value: Any) -> Any:
    """The number that `1e-05` means, which YAML 1.1 takes for a text."""
    scientific = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if scientific else value


def _check_class(field: str, target: Any, known: Any, where: str) -> None:
    module, _, name = str(target).rpartition(".")
    if target is not None and not (module.startswith("megatron.") and known(name)):
        raise refuse(where, field, target, "what this class builds is not known")


def _check_spec(spec: Any, where: str) -> None:
    if isinstance(spec, Mapping):
        spec = spec.get("_target_")
    if spec is None:
        return
    module, _, name = str(spec).rpartition(".")
    if name not in _SPECS or not module.startswith(_SPEC_MODULES):
        why = "layers of a specification of one's own are not known"
        raise refuse(where, "transformer_layer_spec", spec, why)
