"""The whole model in float64 NumPy, forward and hand-written backward: what the native model must equal.

Two families. `gpt2`: LayerNorm, biases, learned positions, GELU. `llama`: RMSNorm, no biases, rotary
positions, SwiGLU, grouped key and value heads. In both, a layer adds two blocks to the residual stream x:

    x = x + attention(norm1(x));  x = x + mlp(norm2(x))

Dimensions: rows = sequences * length tokens, H hidden, D head size, F ffn, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests import reference_ops as ops
from tests.reference_ops import Array, Indices

# What the backward needs of a forward: the inputs of its operations, by name.
Cache = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The model's sizes, with the field names of the configuration file."""

    family: str  # "gpt2" or "llama"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    context: int
    tied_head: bool
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, float] | None = None


class Batch(NamedTuple):
    """One micro-batch: int32 arrays of [rows], row-major over (sequence, index in the sequence)."""

    tokens: Indices
    targets: Indices  # -1: the loss leaves this row out
    positions: Indices  # index in the document
    document_starts: Indices  # index in the sequence of the first token of the row's document
    length: int  # tokens per sequence


def parameter_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name, in the order of the flat buckets: embed, layers, head."""
    gpt2 = shape.family == "gpt2"
    shapes: dict[str, tuple[int, ...]] = {"embed.tokens": (shape.vocabulary, shape.hidden)}
    if gpt2:
        shapes["embed.positions"] = (shape.context, shape.hidden)
    for layer in range(shape.layers):
        shapes |= layer_parameter_shapes(shape, f"layer.{layer}.")
    shapes["final_norm.weight"] = (shape.hidden,)
    if gpt2:
        shapes["final_norm.bias"] = (shape.hidden,)
    if not shape.tied_head:
        shapes["head.weight"] = (shape.vocabulary, shape.hidden)
    return shapes


def layer_parameter_shapes(shape: Shape, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer, whose names begin with `prefix`."""
    hidden, ffn = shape.hidden, shape.ffn
    q_size, kv_size = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    gpt2 = shape.family == "gpt2"
    vectors = {"norm1.bias", "attention.q.bias", "attention.k.bias", "attention.v.bias", "attention.out.bias"}
    vectors |= {"norm2.bias", "mlp.up.bias", "mlp.down.bias"}
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (hidden,),
        "norm1.bias": (hidden,),
        "attention.q.weight": (q_size, hidden),
        "attention.k.weight": (kv_size, hidden),
        "attention.v.weight": (kv_size, hidden),
        "attention.q.bias": (q_size,),
        "attention.k.bias": (kv_size,),
        "attention.v.bias": (kv_size,),
        "attention.out.weight": (q_size, hidden),
        "attention.out.bias": (hidden,),
        "norm2.weight": (hidden,),
        "norm2.bias": (hidden,),
        "mlp.gate.weight": (ffn, hidden),
        "mlp.up.weight": (ffn, hidden),
        "mlp.up.bias": (ffn,),
        "mlp.down.weight": (ffn, hidden),
        "mlp.down.bias": (hidden,),
    }
    absent = {"mlp.gate.weight"} if gpt2 else vectors
    return {prefix + name: size for name, size in shapes.items() if name not in absent}


# Forward and backward, block by block. `layer` holds one layer's parameters, by name without the prefix.


def layer_parameters(parameters: Mapping[str, Array], layer: int) -> dict[str, Array]:
    """The parameters of one layer, by name without "layer.<number>."."""
    prefix = f"layer.{layer}."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def norm_forward(shape: Shape, parameters: Mapping[str, Array], name: str, x: Array) -> Array:
    """The family's norm; x and result are [rows, H]."""
    weight = parameters[name + ".weight"]
    if shape.family == "gpt2":
        return ops.layernorm_forward(x, weight, parameters[name + ".bias"], shape.norm_eps)
    return ops.rmsnorm_forward(x, weight, shape.norm_eps)


def norm_backward(
    shape: Shape, parameters: Mapping[str, Array], name: str, dy: Array, x: Array
) -> tuple[Array, dict[str, Array]]:
    """Gradient of x [rows, H] and of the norm's parameters."""
    weight = parameters[name + ".weight"]
    if shape.family == "gpt2":
        dx, dweight, dbias = ops.layernorm_backward(dy, x, weight, shape.norm_eps)
        return dx, {name + ".weight": dweight, name + ".bias": dbias}
    dx, dweight = ops.rmsnorm_backward(dy, x, weight, shape.norm_eps)
    return dx, {name + ".weight": dweight}


def attention_forward(shape: Shape, layer: Mapping[str, Array], x: Array, batch: Batch) -> tuple[Array, Cache]:
    """The attention block, from normed rows x [rows, H] to what the residual stream gains [rows, H]."""
    q, k, v = (
        ops.column_linear_forward(x, layer[f"attention.{part}.weight"], layer.get(f"attention.{part}.bias"))
        for part in "qkv"
    )  # [rows, heads*D], [rows, kv_heads*D], [rows, kv_heads*D]
    if shape.family == "llama":
        frequencies = ops.rope_frequencies(shape.head_size, shape.rope_theta, shape.rope_scaling)
        q = ops.rope_forward(q, batch.positions, frequencies)
        k = ops.rope_forward(k, batch.positions, frequencies)
    mixed = ops.attention_forward(
        q, k, v, shape.heads, shape.kv_heads, batch.length, batch.document_starts
    )  # [rows, heads*D]
    y = ops.row_linear_forward(mixed, layer["attention.out.weight"], layer.get("attention.out.bias"))
    return y, {"x": x, "q": q, "k": k, "v": v, "mixed": mixed}


def attention_backward(
    shape: Shape, layer: Mapping[str, Array], dy: Array, cache: Cache, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """Gradient of x [rows, H] and of the block's parameters."""
    gradients: dict[str, Array] = {}
    dmixed, gradients["attention.out.weight"], gradients["attention.out.bias"] = ops.row_linear_backward(
        dy, cache["mixed"], layer["attention.out.weight"]
    )
    q, k, v = cache["q"], cache["k"], cache["v"]
    dq, dk, dv = ops.attention_backward(
        dmixed, q, k, v, shape.heads, shape.kv_heads, batch.length, batch.document_starts
    )
    if shape.family == "llama":
        frequencies = ops.rope_frequencies(shape.head_size, shape.rope_theta, shape.rope_scaling)
        dq = ops.rope_backward(dq, batch.positions, frequencies)
        dk = ops.rope_backward(dk, batch.positions, frequencies)
    dx = np.zeros_like(cache["x"])
    for part, dpart in (("q", dq), ("k", dk), ("v", dv)):
        weight = f"attention.{part}.weight"
        dx_part, gradients[weight], gradients[f"attention.{part}.bias"] = ops.column_linear_backward(
            dpart, cache["x"], layer[weight]
        )
        dx += dx_part
    return dx, gradients


def mlp_forward(shape: Shape, layer: Mapping[str, Array], x: Array) -> tuple[Array, Cache]:
    """The feed-forward block, from normed rows x [rows, H] to what the residual stream gains [rows, H]."""
    up = ops.column_linear_forward(x, layer["mlp.up.weight"], layer.get("mlp.up.bias"))  # [rows, F]
    cache: Cache = {"x": x, "up": up}
    if shape.family == "gpt2":
        active = ops.gelu_forward(up)
    else:
        cache["gate"] = ops.column_linear_forward(x, layer["mlp.gate.weight"])  # [rows, F]
        active = ops.swiglu_forward(cache["gate"], up)
    cache["active"] = active
    return ops.row_linear_forward(active, layer["mlp.down.weight"], layer.get("mlp.down.bias")), cache


def mlp_backward(shape: Shape, layer: Mapping[str, Array], dy: Array, cache: Cache) -> tuple[Array, dict[str, Array]]:
    """Gradient of x [rows, H] and of the block's parameters."""
    gradients: dict[str, Array] = {}
    dactive, gradients["mlp.down.weight"], gradients["mlp.down.bias"] = ops.row_linear_backward(
        dy, cache["active"], layer["mlp.down.weight"]
    )
    if shape.family == "gpt2":
        dup = ops.gelu_backward(dactive, cache["up"])
    else:
        dgate, dup = ops.swiglu_backward(dactive, cache["gate"], cache["up"])
    dx, gradients["mlp.up.weight"], gradients["mlp.up.bias"] = ops.column_linear_backward(
        dup, cache["x"], layer["mlp.up.weight"]
    )
    if shape.family == "llama":
        dx_gate, gradients["mlp.gate.weight"], _ = ops.column_linear_backward(
            dgate, cache["x"], layer["mlp.gate.weight"]
        )
        dx = dx + dx_gate
    return dx, gradients


# The whole model.


def model_forward(shape: Shape, parameters: Mapping[str, Array], batch: Batch) -> tuple[float, int, Array, Cache]:
    """Sum of the losses, number of rows in it, logits [rows, V], and what model_backward needs."""
    parameters = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    x = ops.embedding_forward(
        batch.tokens, batch.positions, parameters["embed.tokens"], parameters.get("embed.positions")
    )  # [rows, H]
    layers: list[Cache] = []
    for number in range(shape.layers):
        layer = layer_parameters(parameters, number)
        saved: Cache = {"attention_residual": x}
        y, saved["attention"] = attention_forward(shape, layer, norm_forward(shape, layer, "norm1", x), batch)
        x = x + y
        saved["mlp_residual"] = x
        y, saved["mlp"] = mlp_forward(shape, layer, norm_forward(shape, layer, "norm2", x))
        x = x + y
        layers.append(saved)
    normed = norm_forward(shape, parameters, "final_norm", x)
    logits = ops.column_linear_forward(normed, parameters[head_name(shape)])  # [rows, V]
    loss_sum, count = ops.cross_entropy_forward(logits, batch.targets)
    cache = {"batch": batch, "layers": layers, "final_residual": x, "normed": normed, "logits": logits}
    return loss_sum, count, logits, cache


def model_logits(shape: Shape, parameters: Mapping[str, Array], batch: Batch) -> Array:
    """The logits [rows, V]."""
    return model_forward(shape, parameters, batch)[2]


def model_backward(
    shape: Shape, parameters: Mapping[str, Array], cache: Cache, scale: float = 1.0
) -> dict[str, Array]:
    """Gradient of scale * (sum of the losses) for every parameter, in the order of parameter_shapes."""
    parameters = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    batch: Batch = cache["batch"]
    gradients: dict[str, Array] = {}
    dlogits = ops.cross_entropy_backward(scale, cache["logits"], batch.targets)
    dnormed, dhead, _ = ops.column_linear_backward(dlogits, cache["normed"], parameters[head_name(shape)])
    dx, dnorm = norm_backward(shape, parameters, "final_norm", dnormed, cache["final_residual"])
    gradients |= dnorm
    for number in reversed(range(shape.layers)):
        layer = layer_parameters(parameters, number)
        dx, dlayer = layer_backward(shape, layer, dx, cache["layers"][number], batch)
        gradients |= {f"layer.{number}.{name}": gradient for name, gradient in dlayer.items()}
    gradients["embed.tokens"] = ops.embedding_backward(dx, batch.tokens, shape.vocabulary)
    if shape.family == "gpt2":
        gradients["embed.positions"] = ops.embedding_backward(dx, batch.positions, shape.context)
    if shape.tied_head:
        gradients["embed.tokens"] += dhead
    else:
        gradients["head.weight"] = dhead
    return {name: gradients[name] for name in parameter_shapes(shape)}


def layer_backward(
    shape: Shape, layer: Mapping[str, Array], dx: Array, cache: Cache, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """From the gradient of a layer's result [rows, H] to that of its input and of its parameters.

    Each block adds to the residual stream, so the gradient passes by the block unchanged and what comes back
    through the block is added to it.
    """
    dnormed, dmlp = mlp_backward(shape, layer, dx, cache["mlp"])
    dx_block, dnorm2 = norm_backward(shape, layer, "norm2", dnormed, cache["mlp_residual"])
    dx = dx + dx_block
    dnormed, dattention = attention_backward(shape, layer, dx, cache["attention"], batch)
    dx_block, dnorm1 = norm_backward(shape, layer, "norm1", dnormed, cache["attention_residual"])
    return dx + dx_block, dmlp | dnorm2 | dattention | dnorm1


def head_name(shape: Shape) -> str:
    """The parameter that turns the last norm's result into logits."""
    return "embed.tokens" if shape.tied_head else "head.weight"


# Inputs that make mistakes visible, and the comparison of gradients.


def visible_parameters(shape: Shape, seed: int) -> dict[str, Array]:
    """Weights with which a mistake shows: nothing is 1 or 0, attention is far from uniform, logits differ.

    The values are float64 arrays that float32 can hold, so that a float32 model starts from the same numbers.
    """
    random = np.random.default_rng(seed)
    # A normed row has elements of about unit size, so 1/sqrt(inputs) keeps a product's elements at unit size.
    # q and k are larger: with scores whose standard deviation is near 1.8^2 a softmax picks few keys of many.
    # A tied head multiplies by the embedding: past a deviation of 3 the logits would saturate the softmax.
    unit = 1.0 / math.sqrt(shape.hidden)
    embedding = min(0.5, 3.0 * unit) if shape.tied_head else 0.8
    deviations = {
        "embed.tokens": embedding,
        "embed.positions": embedding,
        "q.weight": 1.8 * unit,
        "k.weight": 1.8 * unit,
        "out.weight": 1.0 / math.sqrt(shape.heads * shape.head_size),
        "down.weight": 1.0 / math.sqrt(shape.ffn),
        "head.weight": 2.0 * unit,
    }
    parameters: dict[str, Array] = {}
    for name, size in parameter_shapes(shape).items():
        if "norm" in name and name.endswith("weight"):
            value = 1.0 + 0.3 * random.standard_normal(size)
        elif name.endswith("bias"):
            value = 0.2 * random.standard_normal(size)
        else:
            value = deviations.get(".".join(name.split(".")[-2:]), unit) * random.standard_normal(size)
        parameters[name] = value.astype(np.float32).astype(np.float64)
    return parameters


def random_batch(shape: Shape, sequences: int, length: int, seed: int, documents: bool = True) -> Batch:
    """Random tokens and targets, about one target in eight -1; with `documents`, about five to a sequence.

    Where there is more than one row, at least one target is -1; never all are. Raises ValueError where the
    length is more than the context.
    """
    if length > shape.context:
        raise ValueError(f"length {length} is more than the context {shape.context}")
    random = np.random.default_rng(seed)
    size = (sequences, length)
    tokens = random.integers(0, shape.vocabulary, size)
    ignored = random.random(size) < 0.125
    ignored[-1, -1] = True
    ignored[0, 0] = False
    targets = np.where(ignored, -1, random.integers(0, shape.vocabulary, size))
    begins = random.random(size) < (4.0 / length if documents else 0.0)
    begins[:, 0] = True
    index = np.broadcast_to(np.arange(length), size)
    starts = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    arrays = [array.astype(np.int32).ravel() for array in (tokens, targets, index - starts, starts)]
    return Batch(arrays[0], arrays[1], arrays[2], arrays[3], length)


def attention_entropy(shape: Shape, parameters: Mapping[str, Array], batch: Batch) -> Array:
    """Mean entropy, in nats, of the attention rows of each layer [layers]; uniform attention has ln(keys)."""
    entropies = []
    for layer in model_forward(shape, parameters, batch)[3]["layers"]:
        probabilities = ops.attention_probabilities(
            layer["attention"]["q"],
            layer["attention"]["k"],
            shape.heads,
            shape.kv_heads,
            batch.length,
            batch.document_starts,
        )
        logarithms = np.log(np.where(probabilities > 0.0, probabilities, 1.0))
        entropies.append(-(probabilities * logarithms).sum(axis=-1).mean())
    return np.array(entropies)


def gradient_error(ours: Mapping[str, Any], reference: Mapping[str, Array]) -> dict[str, float]:
    """Relative error by name: |a - b| / max(|b|, 1e-4 typical), where typical = global norm / sqrt(tensors).

    The attention key bias moves all scores of a row alike, so its gradient is zero but for rounding: its
    error is absolute, in units of the typical norm. Raises AssertionError where names or shapes differ.
    """
    differing = sorted(set(ours) ^ set(reference))
    assert not differing, f"gradients of different parameters: {', '.join(differing)}"
    typical = ops.global_norm(reference) / math.sqrt(len(reference))
    errors = {}
    for name, expected in reference.items():
        got = np.asarray(ours[name], np.float64)
        assert got.shape == expected.shape, f"gradient of {name}: {got.shape}, expected {expected.shape}"
        floor = typical if name.endswith("attention.k.bias") else 1e-4 * typical
        size = max(float(np.linalg.norm(expected)), floor, np.finfo(np.float64).tiny)
        errors[name] = float(np.linalg.norm(got - expected)) / size
    return errors


def assert_gradients_close(ours: Mapping[str, Any], reference: Mapping[str, Array], tolerance: float) -> float:
    """Fails where a gradient_error is above the tolerance or NaN, naming the worst; returns the largest."""
    errors = gradient_error(ours, reference)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    assert errors[worst] <= tolerance, f"gradient of {worst}: error {errors[worst]:.3g} > {tolerance:.3g}"
    return errors[worst]
