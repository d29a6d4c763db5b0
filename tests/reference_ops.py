"""The operations of a transformer in float64 NumPy: what every kernel is compared with.

Each operation is a pair, `x_forward` and `x_backward`, one beside the other. A backward function takes the
gradient of the forward's result (`dy`, or `d` and the result's name), then the forward's own arguments but
for a bias, and returns the gradients of the array arguments in their order. It computes again whatever it
needs, so there is nothing to cache but inputs. Nothing here is fast; everything is meant to be read.

Dimensions: rows = sequences * length tokens, H hidden size, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int32]

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


# Products. A matrix is stored with the dimension that tensor parallelism cuts first, hence two orientations.


def column_linear_forward(
    x: Array,  # [rows, in]
    weight: Array,  # [out, in]
    bias: Array | None = None,  # [out]
) -> Array:  # [rows, out]
    """Column-parallel product: y = x W^T + b."""
    y = x @ weight.T
    return y if bias is None else y + bias


def column_linear_backward(
    dy: Array,  # [rows, out]
    x: Array,  # [rows, in]
    weight: Array,  # [out, in]
) -> tuple[Array, Array, Array]:  # dx [rows, in], dweight [out, in], dbias [out]
    """Gradients of x, weight and bias (to be ignored where there is no bias)."""
    return dy @ weight, dy.T @ x, dy.sum(axis=0)


def row_linear_forward(
    x: Array,  # [rows, in]
    weight: Array,  # [in, out]
    bias: Array | None = None,  # [out]
) -> Array:  # [rows, out]
    """Row-parallel product: y = x W + b."""
    y = x @ weight
    return y if bias is None else y + bias


def row_linear_backward(
    dy: Array,  # [rows, out]
    x: Array,  # [rows, in]
    weight: Array,  # [in, out]
) -> tuple[Array, Array, Array]:  # dx [rows, in], dweight [in, out], dbias [out]
    """Gradients of x, weight and bias (to be ignored where there is no bias)."""
    return dy @ weight.T, x.T @ dy, dy.sum(axis=0)


# Norms, over the last axis.


def layernorm_forward(
    x: Array,  # [rows, H]
    weight: Array,  # [H]
    bias: Array,  # [H]
    eps: float,
) -> Array:  # [rows, H]
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, with the biased variance (Ba et al., 2016)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    normed: Array = centred / np.sqrt(variance + eps)
    return normed * weight + bias


def layernorm_backward(
    dy: Array,  # [rows, H]
    x: Array,  # [rows, H]
    weight: Array,  # [H]
    eps: float,
) -> tuple[Array, Array, Array]:  # dx [rows, H], dweight [H], dbias [H]
    """Gradients of x, weight and bias."""
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1.0 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)  # [rows, 1]
    normed = centred * inverse
    dnormed = dy * weight
    # The mean and the variance depend on x too: their share removes from the gradient what points along a
    # constant and along the normed row, the two directions in which moving x does not change y (but for eps).
    along_constant = dnormed.mean(axis=-1, keepdims=True)
    along_normed = (dnormed * normed).mean(axis=-1, keepdims=True)
    dx = inverse * (dnormed - along_constant - normed * along_normed)
    return dx, (dy * normed).sum(axis=0), dy.sum(axis=0)


def rmsnorm_forward(
    x: Array,  # [rows, H]
    weight: Array,  # [H]
    eps: float,
) -> Array:  # [rows, H]
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019)."""
    normed: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return normed * weight


def rmsnorm_backward(
    dy: Array,  # [rows, H]
    x: Array,  # [rows, H]
    weight: Array,  # [H]
    eps: float,
) -> tuple[Array, Array]:  # dx [rows, H], dweight [H]
    """Gradients of x and weight."""
    inverse = 1.0 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)  # [rows, 1]
    normed = x * inverse
    dnormed = dy * weight
    along_normed = (dnormed * normed).mean(axis=-1, keepdims=True)
    return inverse * (dnormed - normed * along_normed), (dy * normed).sum(axis=0)


# Activations, elementwise: any shape.


def gelu_forward(x: Array) -> Array:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GELU's tanh form (Hendrycks and Gimpel, 2016)."""
    return 0.5 * x * (1.0 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3)))


def gelu_backward(dy: Array, x: Array) -> Array:
    """Gradient of x."""
    tanh = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
    dinner = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x**2)
    return dy * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * dinner)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written with tanh because exp(-x) overflows for very negative x."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def swiglu_forward(gate: Array, up: Array) -> Array:
    """silu(gate) * up, where silu(z) = z sigmoid(z) (Shazeer, 2020)."""
    return gate * sigmoid(gate) * up


def swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Gradients of gate and up."""
    gate_sigmoid = sigmoid(gate)
    dsilu = gate_sigmoid * (1.0 + gate * (1.0 - gate_sigmoid))
    return dy * up * dsilu, dy * gate * gate_sigmoid


# Rotary positions (Su et al., 2021).


def rope_frequencies(
    head_size: int,
    theta: float,
    scaling: Mapping[str, float] | None = None,
) -> Array:  # [D/2]
    """Angle in radians by which each pair of a head turns per position: theta^(-2j/D) for pair j.

    `scaling` is LLaMA 3's stretch for longer contexts, with keys factor, low_freq_factor, high_freq_factor
    and original_max_position_embeddings: pairs that make at most low_freq_factor turns in the original
    context turn `factor` times slower, pairs that make at least high_freq_factor stay, the rest is blended.
    Raises ValueError for an odd head size, which cannot be cut into pairs.
    """
    if head_size % 2:
        raise ValueError(f"rotary positions need an even head size, not {head_size}")
    frequencies = np.asarray(theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size), np.float64)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2.0 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling["factor"]


def rope_forward(
    x: Array,  # [rows, heads*D]
    positions: Indices,  # [rows]
    frequencies: Array,  # [D/2]
) -> Array:  # [rows, heads*D]
    """Turns each pair (j, j + D/2) of every head by position * frequency (the rotate-half layout)."""
    rows, half = x.shape[0], frequencies.size
    angle = positions[:, None, None] * frequencies  # [rows, 1, D/2]
    pairs = x.reshape(rows, -1, 2, half)  # [rows, heads, 2, D/2]
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    turned = np.empty_like(pairs)
    turned[:, :, 0] = first * np.cos(angle) - second * np.sin(angle)
    turned[:, :, 1] = second * np.cos(angle) + first * np.sin(angle)
    return turned.reshape(x.shape)


def rope_backward(
    dy: Array,  # [rows, heads*D]
    positions: Indices,  # [rows]
    frequencies: Array,  # [D/2]
) -> Array:  # [rows, heads*D]
    """Gradient of x: a rotation's transpose is the rotation back."""
    return rope_forward(dy, positions, -frequencies)


# Attention.


def visible_keys(
    document_starts: Indices,  # [rows]
    length: int,
) -> NDArray[np.bool_]:  # [sequences, length, length]
    """Entry [b, t, k] says whether row t of sequence b attends to key k: document_starts[t] <= k <= t."""
    keys = np.arange(length)
    rows = np.arange(length)[:, None]
    return (document_starts.reshape(-1, length, 1) <= keys) & (keys <= rows)


def attention_probabilities(
    q: Array,  # [rows, heads*D]
    k: Array,  # [rows, kv_heads*D]
    heads: int,
    kv_heads: int,
    length: int,
    document_starts: Indices,  # [rows]
) -> Array:  # [sequences, heads, length, length]
    """softmax(q k^T / sqrt(D)) over the visible keys; zero elsewhere."""
    head_size = q.shape[1] // heads
    q_heads = split_heads(q, heads, length)  # [sequences, heads, length, D]
    k_heads = split_heads(k, kv_heads, length).repeat(heads // kv_heads, axis=1)
    scores = q_heads @ k_heads.swapaxes(2, 3) / math.sqrt(head_size)
    scores = np.where(visible_keys(document_starts, length)[:, None], scores, -np.inf)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), np.float64)


def attention_forward(
    q: Array,  # [rows, heads*D]
    k: Array,  # [rows, kv_heads*D]
    v: Array,  # [rows, kv_heads*D]
    heads: int,
    kv_heads: int,
    length: int,
    document_starts: Indices,  # [rows]
) -> Array:  # [rows, heads*D]
    """Causal attention inside documents; query head h reads key and value head h // (heads / kv_heads)."""
    probabilities = attention_probabilities(q, k, heads, kv_heads, length, document_starts)
    v_heads = split_heads(v, kv_heads, length).repeat(heads // kv_heads, axis=1)
    return join_heads(probabilities @ v_heads)


def attention_backward(
    dout: Array,  # [rows, heads*D]
    q: Array,  # [rows, heads*D]
    k: Array,  # [rows, kv_heads*D]
    v: Array,  # [rows, kv_heads*D]
    heads: int,
    kv_heads: int,
    length: int,
    document_starts: Indices,  # [rows]
) -> tuple[Array, Array, Array]:  # dq [rows, heads*D], dk [rows, kv_heads*D], dv [rows, kv_heads*D]
    """Gradients of q, k and v; a key and value head collects from all query heads that read it."""
    group = heads // kv_heads
    scale = 1.0 / math.sqrt(q.shape[1] // heads)
    probabilities = attention_probabilities(q, k, heads, kv_heads, length, document_starts)
    q_heads = split_heads(q, heads, length)  # [sequences, heads, length, D]
    k_heads = split_heads(k, kv_heads, length).repeat(group, axis=1)
    v_heads = split_heads(v, kv_heads, length).repeat(group, axis=1)
    dout_heads = split_heads(dout, heads, length)

    dprobabilities = dout_heads @ v_heads.swapaxes(2, 3)  # [sequences, heads, length, length]
    row_mean = (dprobabilities * probabilities).sum(axis=-1, keepdims=True)
    dscores = probabilities * (dprobabilities - row_mean)
    dq_heads = dscores @ k_heads * scale
    dk_heads = sum_groups(dscores.swapaxes(2, 3) @ q_heads * scale, group)
    dv_heads = sum_groups(probabilities.swapaxes(2, 3) @ dout_heads, group)
    return join_heads(dq_heads), join_heads(dk_heads), join_heads(dv_heads)


def split_heads(x: Array, heads: int, length: int) -> Array:
    """[rows, heads*D] -> [sequences, heads, length, D]."""
    return x.reshape(-1, length, heads, x.shape[1] // heads).swapaxes(1, 2)


def join_heads(x: Array) -> Array:
    """[sequences, heads, length, D] -> [rows, heads*D], undoing split_heads."""
    sequences, heads, length, head_size = x.shape
    return x.swapaxes(1, 2).reshape(sequences * length, heads * head_size)


def sum_groups(x: Array, group: int) -> Array:
    """[sequences, heads, length, D] -> [sequences, heads/group, length, D], undoing repeat(group, axis=1)."""
    sequences, heads, length, head_size = x.shape
    return np.asarray(x.reshape(sequences, heads // group, group, length, head_size).sum(axis=2), np.float64)


# Embedding and loss.


def embedding_forward(
    tokens: Indices,  # [rows]
    positions: Indices,  # [rows]
    token_table: Array,  # [V, H]
    position_table: Array | None = None,  # [context, H]
) -> Array:  # [rows, H]
    """The token's row, plus the position's where positions are learned."""
    x = token_table[tokens]
    return x if position_table is None else x + position_table[positions]


def embedding_backward(
    dx: Array,  # [rows, H]
    indices: Indices,  # [rows]: tokens or positions
    table_rows: int,  # V or context
) -> Array:  # [table_rows, H]
    """Gradient of one of the two tables; rows that share an index add up."""
    dtable = np.zeros((table_rows, dx.shape[1]))
    np.add.at(dtable, indices, dx)
    return dtable


def log_softmax(logits: Array) -> Array:
    """log(softmax(logits)) over the last axis, through the row maximum so that nothing overflows."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float64)


def cross_entropy_forward(
    logits: Array,  # [rows, V]
    targets: Indices,  # [rows]
) -> tuple[float, int]:
    """Sum of -log softmax(logits)[target] and number of terms; a row whose target is -1 has none."""
    counted = np.flatnonzero(targets != -1)
    return float(-log_softmax(logits)[counted, targets[counted]].sum()), int(counted.size)


def cross_entropy_backward(
    dloss: float,
    logits: Array,  # [rows, V]
    targets: Indices,  # [rows]
) -> Array:  # [rows, V]
    """Gradient of the logits; `dloss` is the gradient of the sum, 1/count for the mean loss."""
    counted = np.flatnonzero(targets != -1)
    dlogits = np.zeros_like(logits)
    dlogits[counted] = np.exp(log_softmax(logits[counted]))
    dlogits[counted, targets[counted]] -= 1.0
    return dloss * dlogits


# Optimizer.


def adamw(
    parameter: Array,
    gradient: Array,
    first_moment: Array,
    second_moment: Array,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Array, Array, Array]:  # the new parameter, first moment and second moment
    """One step of AdamW with bias correction; `step` is 1 at the first (Loshchilov and Hutter, 2019).

    The decay is decoupled: it shrinks the old parameter by the share learning_rate * weight_decay and never
    meets the moments.
    """
    first_moment = betas[0] * first_moment + (1.0 - betas[0]) * gradient
    second_moment = betas[1] * second_moment + (1.0 - betas[1]) * gradient**2
    corrected_first = first_moment / (1.0 - betas[0] ** step)
    corrected_second = second_moment / (1.0 - betas[1] ** step)
    update = corrected_first / (np.sqrt(corrected_second) + eps) + weight_decay * parameter
    return parameter - learning_rate * update, first_moment, second_moment


def global_norm(gradients: Mapping[str, Array]) -> float:
    """Euclidean norm of all gradients taken as one vector."""
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))


def clip_gradients(gradients: Mapping[str, Array], max_norm: float) -> tuple[dict[str, Array], float]:
    """Gradients scaled so that their global norm is at most max_norm, and the norm before that."""
    norm = global_norm(gradients)
    factor = 1.0 if norm <= max_norm else max_norm / norm
    return {name: gradient * factor for name, gradient in gradients.items()}, norm
