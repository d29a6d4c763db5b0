"""config.json, both ways."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pytrain.checkpoint.huggingface.configuration import export_model, import_model
from pytrain.config import build_model
from pytrain.errors import UserError
from tests.huggingface_cases import GPT2, LLAMA, MODELS, SCALING, model

LLAMA_FILE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_FILE: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256
}  # fmt: skip


def read(tmp_path: Path, values: dict[str, Any]) -> Any:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return import_model(path)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, export_model(model(name), "fp32", {})) == model(name)


def test_defaults(tmp_path: Path) -> None:
    llama = read(tmp_path, LLAMA_FILE | {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None})
    assert (llama.kv_heads, llama.head_size, llama.tied_head) == (4, 16, False)
    assert (llama.norm_eps, llama.rope_theta, llama.rope_scaling) == (1e-6, 10000.0, None)
    gpt2 = read(tmp_path, GPT2_FILE | {"n_inner": None})
    assert (gpt2.ffn, gpt2.tied_head, gpt2.norm_eps, gpt2.context) == (256, True, 1e-5, 256)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000, "rope_scaling": SCALING},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {"type": "llama3"} | {k: v for k, v in SCALING.items() if k != "rope_type"},
        },
        {"rope_parameters": {"rope_theta": 500000.0, **SCALING}},
        {"rope_parameters": {"rope_theta": 500000.0, **SCALING}, "rope_theta": None, "rope_scaling": None},
    ],
)
def test_rope_in_every_spelling(tmp_path: Path, spelling: dict[str, Any]) -> None:
    shape = read(tmp_path, LLAMA_FILE | spelling)
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling.model_dump() == SCALING


def test_default_rope_parameters(tmp_path: Path) -> None:
    shape = read(tmp_path, LLAMA_FILE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert (shape.rope_theta, shape.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "mistral"}, '.*: model_type is \'mistral\', and pytrain has "gpt2" and "llama"'),
        (
            LLAMA_FILE | {"attention_bias": True},
            ".*: attention_bias is True, and pytrain only computes False",
        ),
        (LLAMA_FILE | {"mlp_bias": True}, ".*: mlp_bias is True, and pytrain only computes False"),
        (LLAMA_FILE | {"hidden_act": "gelu"}, ".*: hidden_act is 'gelu', and pytrain only computes 'silu'"),
        (LLAMA_FILE | {"quantization_config": {"bits": 4}}, ".*: quantization_config is .*computes None"),
        (
            LLAMA_FILE | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            '.*: rope_scaling.rope_type is \'linear\', and pytrain has "default" and "llama3"',
        ),
        (LLAMA_FILE | {"rope_scaling": {"rope_type": "llama3"}}, ".*: rope_scaling has no factor"),
        (
            LLAMA_FILE | {"rope_parameters": {"full": {"rope_theta": 1.0}}},
            ".*: rope_parameters differs from layer .*",
        ),
        (
            LLAMA_FILE | {"rope_parameters": {"partial_rotary_factor": 0.5}},
            ".*: rope_parameters.partial_rotary_factor is not 1, and pytrain turns whole heads",
        ),
        (LLAMA_FILE | {"num_hidden_layers": None}, ".*/config.json has no num_hidden_layers"),
        (LLAMA_FILE | {"vocab_size": "many"}, ".*/config.json: model.vocabulary .*"),
        (
            LLAMA_FILE | {"hidden_size": 65},
            r".*/config.json: model.hidden \(65\) is not divisible by model.heads .*",
        ),
        (
            GPT2_FILE | {"activation_function": "gelu"},
            ".*: activation_function is 'gelu', and .* 'gelu_new'",
        ),
        (
            GPT2_FILE | {"scale_attn_by_inverse_layer_idx": True},
            ".*: scale_attn_by_inverse_layer_idx is True, .*",
        ),
        (GPT2_FILE | {"scale_attn_weights": False}, ".*: scale_attn_weights is False, .*"),
    ],
)
def test_refused(tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, values)
    assert re.fullmatch(sentence, str(caught.value)), str(caught.value)


def test_gpt2_shapes_that_transformers_lacks() -> None:
    with pytest.raises(UserError, match=r"^transformers' GPT-2 has no grouped key and value heads, but .* 1 of 3$"):
        export_model(build_model(GPT2 | {"kv_heads": 1}), "fp32", {})
    with pytest.raises(UserError, match=r"3 heads of 10 are not model.hidden \(24\)$"):
        export_model(build_model(GPT2 | {"head_size": 10}), "fp32", {})
    assert export_model(build_model(LLAMA), "bf16", {})["torch_dtype"] == "bfloat16"
