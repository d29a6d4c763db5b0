"""The float64 reference against PyTorch's operations and against the models of transformers, in float64."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from tests import reference
from tests import reference_ops as ops
from tests.reference import Shape
from tests.reference_cases import LARGE_EPS, OPERATIONS, SHAPES, case_seed, op_case, small_batch

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: nothing to compare with"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="PyTorch and transformers are not both installed: nothing to compare with",
)


def torch_operation(name: str, seed: int) -> Callable[..., Any]:
    """PyTorch's own version of op_case(name, seed).forward, on tensors."""
    import torch
    from torch.nn import functional

    batch = small_batch(seed)
    tokens, positions, targets = (
        torch.from_numpy(array.astype(np.int64)) for array in (batch.tokens, batch.positions, batch.targets)
    )
    seen = torch.from_numpy(ops.visible_keys(batch.document_starts, batch.length))[:, None]

    def attention(q: Any, k: Any, v: Any) -> Any:
        size = 5 if name == "attention, odd head" else 4
        heads = [part.reshape(-1, batch.length, part.shape[1] // size, size).transpose(1, 2) for part in (q, k, v)]
        out = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)

    operations: dict[str, Callable[..., Any]] = {
        "column linear": functional.linear,
        "row linear": lambda x, weight, bias: functional.linear(x, weight.T, bias),
        "layernorm": lambda x, weight, bias: functional.layer_norm(x, (5,), weight, bias, LARGE_EPS),
        "rmsnorm": lambda x, weight: functional.rms_norm(x, (5,), weight, LARGE_EPS),
        "gelu": lambda x: functional.gelu(x, approximate="tanh"),
        "swiglu": lambda gate, up: functional.silu(gate) * up,
        "embedding": lambda table, learned: (
            functional.embedding(tokens, table) + functional.embedding(positions, learned)
        ),
        "cross-entropy": lambda logits: functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum"),
    }
    return attention if name.startswith("attention") else operations[name]


@needs_torch
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "rope"])
def test_operation_equals_torch(name: str) -> None:
    import torch

    seed = case_seed(name)
    case = op_case(name, seed)
    inputs = [torch.from_numpy(value).requires_grad_() for value in case.inputs]
    expected = torch_operation(name, seed)(*inputs)
    result = case.forward(*case.inputs)
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-11, atol=1e-12)
    dy = np.random.default_rng(seed + 1).standard_normal(result.shape)
    gradients = torch.autograd.grad(expected, inputs, torch.from_numpy(np.asarray(dy)))
    for ours, theirs in zip(case.backward(dy, *case.inputs), gradients, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-11, atol=1e-12)


@needs_torch
def test_adamw_and_clipping_equal_torch() -> None:
    import torch

    seed = case_seed("adamw")
    random = np.random.default_rng(seed)
    parameter = random.standard_normal((4, 3))
    tensor = torch.from_numpy(parameter.copy()).requires_grad_()
    optimizer = torch.optim.AdamW([tensor], lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    first, second = np.zeros((4, 3)), np.zeros((4, 3))
    for step in range(1, 6):
        gradient = random.standard_normal((4, 3))
        clipped, norm = ops.clip_gradients({"weight": gradient}, 1.0)
        tensor.grad = torch.from_numpy(gradient.copy())
        their_norm = torch.nn.utils.clip_grad_norm_([tensor], 1.0)
        assert norm == pytest.approx(float(their_norm), rel=1e-12)
        assert norm > 1.0
        # PyTorch adds 1e-6 to the norm before it divides.
        np.testing.assert_allclose(clipped["weight"], tensor.grad.numpy(), rtol=2e-6)
        tensor.grad = torch.from_numpy(clipped["weight"])
        optimizer.step()
        parameter, first, second = ops.adamw(
            parameter, clipped["weight"], first, second, step, 0.01, (0.8, 0.95), 1e-3, 0.2
        )
        np.testing.assert_allclose(parameter, tensor.detach().numpy(), rtol=1e-12)


def huggingface_model(shape: Shape) -> Any:
    """The transformers model of this shape, float64, with its own random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model: Any
    if shape.family == "gpt2":
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.ffn,
            layer_norm_epsilon=shape.norm_eps,
            tie_word_embeddings=shape.tied_head,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
        return model.double().eval()
    scaling = {"rope_type": "llama3", **shape.rope_scaling} if shape.rope_scaling else {"rope_type": "default"}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            max_position_embeddings=shape.context,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_size,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=shape.tied_head,
            rope_parameters={"rope_theta": shape.rope_theta, **scaling},
        )
    )
    return model.double().eval()


def our_names(shape: Shape, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Views of their tensors (weights or gradients) under our names and in our orientation."""
    gpt2 = shape.family == "gpt2"
    prefix = "transformer." if gpt2 else "model."
    outer = {"embed.tokens": "wte.weight", "embed.positions": "wpe.weight", "final_norm": "ln_f"}
    inner = {"norm1": "ln_1", "norm2": "ln_2", "attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    inner["mlp.down"] = "mlp.c_proj"
    if not gpt2:
        outer = {"embed.tokens": "embed_tokens.weight", "final_norm": "norm"}
        inner = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        inner |= {
            f"attention.{ours}": f"self_attn.{name}_proj"
            for ours, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        }
        inner |= {f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    result = {}
    for name in reference.parameter_shapes(shape):
        module, _, kind = name.rpartition(".")
        if name == "head.weight":
            result[name] = theirs["lm_head.weight"]
        elif not name.startswith("layer."):
            result[name] = theirs[prefix + (outer.get(name) or f"{outer[module]}.{kind}")]
        else:
            _, layer, part = module.split(".", 2)
            block = f"{prefix}{'h' if gpt2 else 'layers'}.{layer}."
            if gpt2 and part in ("attention.q", "attention.k", "attention.v"):
                index = "qkv".index(part[-1]) * shape.hidden
                result[name] = theirs[f"{block}attn.c_attn.{kind}"].transpose(0, -1)[index : index + shape.hidden]
            else:
                tensor = theirs[f"{block}{inner[part]}.{kind}"]
                # GPT-2 keeps [in, out], LLaMA [out, in]; ours is [in, out] for the row-parallel two alone.
                turned = (part in ("attention.out", "mlp.down")) != gpt2
                result[name] = tensor.T if turned and tensor.ndim == 2 else tensor
    return result


@needs_transformers
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "gpt2 grouped keys"])
def test_model_equals_transformers(name: str) -> None:
    import torch

    shape, seed = SHAPES[name], case_seed(name)
    parameters = reference.visible_parameters(shape, seed)
    batch = reference.random_batch(shape, 3, 12, seed)
    model = huggingface_model(shape)
    with torch.no_grad():
        for key, view in our_names(shape, dict(model.named_parameters())).items():
            view.copy_(torch.from_numpy(parameters[key]))
    seen = torch.from_numpy(ops.visible_keys(batch.document_starts, batch.length))[:, None]
    tokens, positions, targets = (
        torch.from_numpy(array.astype(np.int64)).reshape(3, 12)
        for array in (batch.tokens, batch.positions, batch.targets)
    )
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    output = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    expected = output.logits.reshape(36, -1)
    loss: Any = torch.nn.functional.cross_entropy(expected, targets.flatten(), ignore_index=-1, reduction="sum")
    loss.backward()

    loss_sum, count, logits, cache = reference.model_forward(shape, parameters, batch)
    assert count == int((targets != -1).sum())
    # transformers computes LLaMA's norms and rotary angles in float32 whatever the model's type.
    tolerance = 1e-11 if shape.family == "gpt2" else 2e-6
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=tolerance * np.abs(logits).max())
    assert loss_sum == pytest.approx(loss.item(), rel=tolerance)
    theirs = our_names(shape, {key: value.grad for key, value in model.named_parameters()})
    gradients = reference.model_backward(shape, parameters, cache)
    worst = reference.assert_gradients_close(
        {key: value.numpy() for key, value in theirs.items()}, gradients, 2.0 * tolerance
    )
    print(f"largest gradient error {worst:.2g}")
