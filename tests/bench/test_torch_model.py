"""PyTorch's side of `bench.step` computes the same model: its loss and gradients are those of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.reference import Shape, head_name, model_backward, model_forward, random_batch, visible_parameters

SHAPES = {
    "gpt2": Shape("gpt2", 2, 24, 3, 3, 8, 96, 50, 20, tied_head=True),
    "llama": Shape("llama", 2, 24, 4, 2, 6, 40, 50, 20, tied_head=False),
}
LENGTH, SEQUENCES = 16, 3


def as_torch(shape: Shape, values: dict[str, Any]) -> dict[str, Any]:
    """The reference's arrays under PyTorch's names: fused where it fuses, transposed where it does."""
    gpt2 = shape.family == "gpt2"
    kinds = ("weight", "bias") if gpt2 else ("weight",)
    names = {"tokens.weight": values["embed.tokens"], "head.weight": values[head_name(shape)]}
    if gpt2:
        names["positions.weight"] = values["embed.positions"]
    for kind in kinds:
        names[f"norm.{kind}"] = values[f"final_norm.{kind}"]
        for layer in range(shape.layers):
            ours, theirs = f"layer.{layer}", f"layers.{layer}"
            for norm in ("norm1", "norm2"):
                names[f"{theirs}.{norm}.{kind}"] = values[f"{ours}.{norm}.{kind}"]
            parts = [values[f"{ours}.attention.{part}.{kind}"] for part in "qkv"]
            names[f"{theirs}.attention.qkv.{kind}"] = np.concatenate(parts)
            ups = [values[f"{ours}.mlp.{part}.{kind}"] for part in (("up",) if gpt2 else ("gate", "up"))]
            names[f"{theirs}.mlp.up.{kind}"] = np.concatenate(ups)
            for part, whole in (("attention.out", "attention.out"), ("mlp.down", "mlp.down")):
                value = values[f"{ours}.{part}.{kind}"]
                names[f"{theirs}.{whole}.{kind}"] = value.T if kind == "weight" else value
    return names


@pytest.mark.parametrize("family", SHAPES)
def test_the_peer_is_the_same_model(family: str, seed: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    from bench._torch_model import Transformer

    shape = SHAPES[family]
    parameters = visible_parameters(shape, seed)
    batch = random_batch(shape, SEQUENCES, LENGTH, seed, documents=False)
    batch = batch._replace(targets=np.abs(batch.targets))  # the peer predicts every token
    loss_sum, count, _, cache = model_forward(shape, parameters, batch)
    wanted = as_torch(shape, model_backward(shape, parameters, cache, 1.0 / count))
    keys = {**vars(shape), "init_std": 0.02}
    model = Transformer(keys, LENGTH).double()
    state = {
        name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in as_torch(shape, parameters).items()
    }
    missing = model.load_state_dict(state, strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    tokens, targets = (
        torch.from_numpy(x.reshape(SEQUENCES, LENGTH).astype(np.int64)) for x in (batch.tokens, batch.targets)
    )
    loss = model(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(loss_sum / count, rel=1e-6)
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert set(gradients) == set(wanted) - ({"head.weight"} if shape.tied_head else set())
    for name, gradient in gradients.items():
        error = np.abs(gradient - wanted[name]).max() / max(np.abs(wanted[name]).max(), 1e-3)
        assert error < 1e-4, name  # the logits are rounded to fp32 before the loss
