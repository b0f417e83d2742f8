"""Fields of Hugging Face JSON files: types and ranges, and an allow-list of names per family.

A field is read, known to be harmless at inference, or refused by name unless it is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sps2_mega.checkpoint.json_file import shown
from sps2_mega.errors import CheckpointError, ConfigError

Layers = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=2**24)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Epsilon = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Theta = Annotated[float, Field(gt=1)]


class _Fields(BaseModel):
    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class _Shared(_Fields):
    vocab_size: Count
    architectures: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    is_causal: bool = True
    is_encoder_decoder: bool = False
    use_mrope: bool = False
    rope_interleaved: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = False
    pruned_heads: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: Any = None


class _Rotary(_Shared):
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 1
    rms_norm_eps: Epsilon = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    layer_types: list[str] | None = None


class _Windowed(_Rotary):
    sliding_window: Count | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0)] = 0


class _GPT2(_Shared):
    n_embd: Width
    n_layer: Layers
    n_head: Width
    n_positions: Count
    n_inner: Width | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


class _Rope(_Fields):
    rope_theta: Theta | None = None
    rope_type: str | None = None
    type: str | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    attention_factor: Positive | None = None
    beta_fast: NotNegative | None = None
    beta_slow: NotNegative | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: bool | None = None


class _Index(_Fields):
    weight_map: dict[str, str]


class _Generation(_Fields):
    eos_token_id: TokenId | list[TokenId] | None = None


_FAMILIES: dict[str, type[_Shared]] = {
    "llama": _Rotary,
    "mistral": _Windowed,
    "qwen2": _Windowed,
    "qwen3": _Windowed,
    "gpt2": _GPT2,
}

# Fields at which transformers looks on the way from ids to logits, all without effect on them.
READ_WITHOUT_EFFECT: dict[str, str] = {
    "names the folder": "_name_or_path name_or_path",
    "chooses among kernels of the same attention": "_attn_implementation reorder_and_upcast_attn",
    "drops out in training only": "attention_dropout attn_pdrop embd_pdrop resid_pdrop",
    "draws the weights that the files replace": "initializer_range",
    "saves memory in training": "gradient_checkpointing",
    "keeps a gradient from one row of the embedding": "pad_token_id",
    "chooses what is returned beside logits": """
        return_dict use_cache output_attentions output_hidden_states""",
}
# Fields at which nothing looks on that way, by what they are for. A test traces every look.
NOT_READ: dict[str, str] = {
    "records where a model is from": """
        model_type transformers_version _commit_hash tokenizer_class
        unsloth_version unsloth_fixed transformers.js_config""",
    "nanotron's mark of a Llama (SmolLM2)": "is_llama_config",
    "is about the text before it is ids": """
        prefix model_max_length max_sequence_length tokenizer_model_max_length""",
    "names classes of classifiers, or shapes heads other than that of a language model": """
        id2label label2id num_labels _num_labels problem_type task_specific_params finetuning_task
        summary_type summary_use_proj summary_activation summary_proj_to_labels
        summary_first_dropout""",
    "is for training, or for encoders": """
        hidden_dropout chunk_size_feed_forward is_decoder cross_attention_hidden_size
        tie_encoder_decoder sep_token_id decoder_start_token_id""",
    "chose a kernel or a form of output in releases before 5": """
        attn_implementation _attn_implementation_autoset _flash_attn_2_enabled pretraining_tp
        torchscript use_bfloat16 tf_legacy_loss n_ctx""",
    # transformers drops these from config.json: generation_config.json states them.
    "is about generation": """
        assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
        encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
        forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
        no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
        num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
        return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p
        typical_p""",
}
HARMLESS = frozenset(" ".join([*READ_WITHOUT_EFFECT.values(), *NOT_READ.values()]).split())
# Fields of which one value says what is computed here anyway. Published folders state the last two
# as switched off (DeepSeek's distilled Qwen, SmolLM2), and no class of transformers reads them.
_NEEDED: dict[str, Any] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_mrope": False,
    "rope_interleaved": False,
}


def known_fields(family: str) -> frozenset[str]:
    """Names that a family's config.json may have at any value: read or harmless."""
    return HARMLESS | _FAMILIES[family].model_fields.keys()


def check_config(family: str, hf: Mapping[str, Any]) -> None:
    """Check every field of a config.json.

    Raises:
        ConfigError: names the first wrong field, its value and what is needed.
    """
    if problem := _problem(_FAMILIES[family], hf):
        raise ConfigError(problem)
    for name, needed in _NEEDED.items():
        if hf.get(name, needed) != needed:
            raise ConfigError(f"{name}={hf[name]!r} is not supported (needs {needed!r})")
    if hf.get("quantization_config") is not None:
        raise ConfigError("quantization_config is set: quantized weights are not supported")
    if own := [name for name in hf.get("auto_map") or () if name.startswith("AutoModel")]:
        raise ConfigError(
            f"auto_map names code of the folder's own for {own[0]}, which is not run (where the "
            f"model is an ordinary {family}, remove auto_map)"
        )
    if hf.get("pruned_heads"):
        raise ConfigError(f"pruned_heads={shown(hf['pruned_heads'])} is not supported (needs {{}})")
    known = known_fields(family)
    for name, value in hf.items():
        if name not in known and value is not None:
            raise ConfigError(
                f"{shown(name)[1:-1]}={shown(value)} is not known for model_type={family!r} and "
                "may change results (needs to be absent or null)"
            )


def check_rope(given: Mapping[str, Any], where: str) -> None:
    """Check the fields of one set of rotary parameters.

    Raises:
        ConfigError: names the first wrong field, or layer types that have parameters of their own.
    """
    if nested := [name for name, value in given.items() if isinstance(value, dict)]:
        raise ConfigError(
            f"{where} has parameters per layer type ({shown(nested)}): one set for all layers is "
            "needed"
        )
    if problem := _problem(_Rope, given):
        raise ConfigError(f"{where}: {problem}")


def check_generation(content: Mapping[str, Any], where: str) -> None:
    """Check the fields of a generation_config.json that are read: the end tokens.

    Raises:
        ConfigError: names the wrong field.
    """
    if problem := _problem(_Generation, content):
        raise ConfigError(f"{where}: {problem}")


def weight_map(content: Mapping[str, Any], where: str) -> dict[str, str]:
    """Tensor name -> file name, of an index file.

    Raises:
        CheckpointError: it is absent, empty, or not a mapping of texts.
    """
    if problem := _problem(_Index, content):
        raise CheckpointError(f"{where}: {problem}")
    if not content["weight_map"]:
        raise CheckpointError(f"{where}: weight_map={{}} names no tensor")
    return dict(content["weight_map"])


def _problem(model: type[BaseModel], content: Mapping[str, Any]) -> str | None:
    try:
        model.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        found = f"{name}={shown(content[name])}" if name in content else f"{name} is absent"
        return f"{found}: {' '.join(first['msg'].split())}"
    return None
