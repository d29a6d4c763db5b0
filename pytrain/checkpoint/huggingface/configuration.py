"""`config.json` of transformers to the shape of a model, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytrain.checkpoint.files import naming
from pytrain.config import ModelConfig, build_model
from pytrain.errors import UserError

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What pytrain computes, where transformers has a choice: key -> values that mean just that; the first is the
# default.
_LLAMA_ONLY: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_GPT2_ONLY: Mapping[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a `UserError` names the file that cannot be read."""
    with naming(path, "read"):
        content = path.read_bytes()
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one JSON object, not a {type(values).__name__}")
    return values


def import_model(path: Path) -> ModelConfig:
    """The shape that a config.json describes. Dropout is left out: pytrain has none.

    Raises:
        UserError: the file is not a GPT-2's or a LLaMA's, or asks for something that pytrain does not
            compute.
    """
    values = read_json(path)
    family = values.get("model_type")
    if family == "llama":
        _refuse_others(path, values, _LLAMA_ONLY)
        table = _llama_table(path, values)
    elif family == "gpt2":
        _refuse_others(path, values, _GPT2_ONLY)
        table = _gpt2_table(path, values)
    else:
        raise UserError(f'{path}: model_type is {family!r}, and pytrain has "gpt2" and "llama"')
    return build_model({key: value for key, value in table.items() if value is not None}, str(path))


def _refuse_others(path: Path, values: Mapping[str, Any], only: Mapping[str, tuple[object, ...]]) -> None:
    for key, allowed in only.items():
        value = values.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{path}: {key} is {value!r}, and pytrain only computes {allowed[0]!r}")


def _required(path: Path, values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise UserError(f"{path} has no {key}")
    return values[key]


def _llama_table(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    theta, scaling = _rope(path, values)
    return {
        "family": "llama",
        "layers": _required(path, values, "num_hidden_layers"),
        "hidden": _required(path, values, "hidden_size"),
        "heads": _required(path, values, "num_attention_heads"),
        "kv_heads": values.get("num_key_value_heads"),
        "head_size": values.get("head_dim"),
        "ffn": _required(path, values, "intermediate_size"),
        "vocabulary": _required(path, values, "vocab_size"),
        "context": _required(path, values, "max_position_embeddings"),
        "tied_head": values.get("tie_word_embeddings", False),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "init_std": values.get("initializer_range", 0.02),
    }


def _gpt2_table(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "layers": _required(path, values, "n_layer"),
        "hidden": _required(path, values, "n_embd"),
        "heads": _required(path, values, "n_head"),
        "ffn": values.get("n_inner"),
        "vocabulary": _required(path, values, "vocab_size"),
        "context": _required(path, values, "n_positions"),
        "tied_head": values.get("tie_word_embeddings", True),
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "init_std": values.get("initializer_range", 0.02),
    }


def _rope(path: Path, values: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base of the wavelengths, and Llama 3's scaling or None; newer files have both in `rope_parameters`."""
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    scaling: Any = values.get(key) or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: {key} is {scaling!r}, not an object")
    theta = scaling.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(f"{path}: {key} differs from layer to layer, and pytrain turns all layers alike")
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{path}: {key}.partial_rotary_factor is not 1, and pytrain turns whole heads")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f'{path}: {key}.rope_type is {kind!r}, and pytrain has "default" and "llama3"')
    for name in _LLAMA3_KEYS:
        if scaling.get(name) is None:
            raise UserError(f"{path}: {key} has no {name}")
    return theta, {"rope_type": "llama3", **{name: scaling[name] for name in _LLAMA3_KEYS}}


def export_model(model: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json.

    dtype: of the weights ("fp32", "bf16", "fp16"). token_ids: values of TOKEN_IDS.

    Raises:
        UserError: transformers has no such model.
    """
    values = _export_gpt2(model) if model.family == "gpt2" else _export_llama(model)
    common = {
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_head,
        "torch_dtype": TORCH_NAMES[dtype],
        "use_cache": True,
        "vocab_size": model.vocabulary,
    }
    return values | common | {key: token_ids.get(key) for key in TOKEN_IDS}


def _export_llama(model: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm_eps,
        # The older spelling, which every version of transformers reads; `rope_parameters` only the newest do.
        "rope_scaling": model.rope_scaling.model_dump() if model.rope_scaling else None,
        "rope_theta": model.rope_theta,
    }


def _export_gpt2(model: ModelConfig) -> dict[str, Any]:
    if model.kv_heads != model.heads:
        raise UserError(
            f"transformers' GPT-2 has no grouped key and value heads, but model.kv_heads is {model.kv_heads} "
            f"of {model.heads}"
        )
    if model.heads * model.head_size != model.hidden:
        raise UserError(
            f"transformers' GPT-2 has heads of hidden / heads channels, but {model.heads} heads of "
            f"{model.head_size} are not model.hidden ({model.hidden})"
        )
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "layer_norm_epsilon": model.norm_eps,
        "model_type": "gpt2",
        "n_embd": model.hidden,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "n_layer": model.layers,
        "n_positions": model.context,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    }
