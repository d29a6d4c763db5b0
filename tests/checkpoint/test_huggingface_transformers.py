"""Exported models in transformers: its logits are those of the float64 reference on the same weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytrain.checkpoint import Checkpoint
from pytrain.checkpoint.huggingface import export_huggingface, import_huggingface
from pytrain.config import ModelConfig, build_model
from tests import reference
from tests.huggingface_cases import save_weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="PyTorch and transformers are not both installed: nothing to compare with",
)

SCALING = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA = {
    "family": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_size": 24, "ffn": 112,
    "vocabulary": 131, "context": 512, "rope_theta": 500000.0, "norm_eps": 1e-6,
}  # fmt: skip
GPT2 = {
    "family": "gpt2",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "ffn": 112,
    "vocabulary": 131,
    "context": 512,
}
MODELS = {
    "llama": LLAMA,
    "llama, tied, scaled": LLAMA | {"tied_head": True, "rope_scaling": SCALING},
    "gpt2": GPT2,
    "gpt2, untied": GPT2 | {"tied_head": False},
}
LENGTH = 512


def reference_shape(model: ModelConfig) -> reference.Shape:
    values = model.model_dump(exclude={"init_std"})
    if model.rope_scaling is not None:
        values["rope_scaling"] = {key: values["rope_scaling"][key] for key in SCALING}
    return reference.Shape(**values)


def reference_logits(checkpoint: Checkpoint, model: ModelConfig, batch: reference.Batch) -> Any:
    weights = {name: checkpoint.read(name).astype(np.float64) for name in checkpoint.tensors()}
    return reference.model_logits(reference_shape(model), weights, batch)


def their_logits(folder: Path, batch: reference.Batch) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        tokens = torch.from_numpy(batch.tokens.astype(np.int64)).reshape(1, -1)
        return loaded.eval()(input_ids=tokens, use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_exported_logits(tmp_path: Path, name: str) -> None:
    model, seed = build_model(MODELS[name]), 11
    print(f"seed {seed}")
    shape = reference_shape(model)
    weights = reference.visible_parameters(shape, seed)
    for layer in range(shape.layers):
        # transformers computes rotary angles in float32 whatever the model's type; the sharper the
        # attention, the more of that rounding (3e-5 at position 512) reaches the logits.
        weights[f"layer.{layer}.attention.q.weight"] *= 0.5
    checkpoint = save_weights(tmp_path / "run", model, "fp32", weights)
    folder = export_huggingface(checkpoint, tmp_path / "hf", shard_bytes=100_000)
    batch = reference.random_batch(shape, 1, LENGTH, seed, documents=False)
    expected = reference_logits(checkpoint, model, batch)
    assert expected.std() >= 1.0
    difference = np.abs(their_logits(folder, batch) - expected).max()
    print(f"{name}: standard deviation {expected.std():.3g}, largest difference {difference:.3g}")
    assert difference < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_that_transformers_saved(tmp_path: Path, family: str, dtype: str) -> None:
    import safetensors.torch
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    original: Any
    if family == "gpt2":
        config = GPT2Config(vocab_size=131, n_positions=96, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3)
        original = GPT2LMHeadModel(config)
    else:
        original = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=131,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=96,
                initializer_range=0.3,
                rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **SCALING},
            )
        )
    original.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    imported = import_huggingface(tmp_path / "theirs", tmp_path / "run")
    checkpoint = Checkpoint.open(imported.checkpoint)
    exported = export_huggingface(checkpoint, tmp_path / "ours")
    theirs = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    ours = safetensors.torch.load_file(exported / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name

    from pytrain.checkpoint.huggingface import model_of

    model = model_of(checkpoint)
    batch = reference.random_batch(reference_shape(model), 1, 96, 5, documents=False)
    expected = reference_logits(checkpoint, model, batch)
    for folder in (tmp_path / "theirs", exported):
        np.testing.assert_allclose(their_logits(folder, batch), expected, rtol=0, atol=1e-4)
