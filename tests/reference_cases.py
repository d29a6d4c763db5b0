"""Small model shapes and single operations on random inputs, for the tests of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tests import reference
from tests import reference_ops as ops
from tests.reference import Batch, Shape
from tests.reference_ops import Array

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 160,
}

LARGE_EPS = 0.1  # so that a gradient which leaves it out is wrong by far

GPT2 = Shape("gpt2", 2, 24, 3, 3, 8, 40, 19, 12, tied_head=True)
LLAMA = Shape("llama", 2, 24, 4, 2, 6, 20, 19, 12, tied_head=False)
SHAPES = {
    "gpt2": GPT2,
    "gpt2 untied": dataclasses.replace(GPT2, tied_head=False),
    "gpt2 odd head": dataclasses.replace(GPT2, hidden=15, head_size=5),
    "gpt2 grouped keys": dataclasses.replace(GPT2, heads=4, kv_heads=2, head_size=6),
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tied_head=True),
    "llama one key head": dataclasses.replace(LLAMA, kv_heads=1, head_size=10),
    "llama all heads, scaled": dataclasses.replace(LLAMA, kv_heads=4, rope_scaling=LLAMA3_SCALING),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on its inputs; `backward` takes dy and the inputs, one gradient per input comes back."""

    inputs: list[Array]
    forward: Callable[..., Array]
    backward: Callable[..., Sequence[Array]]


def small_batch(seed: int, documents: bool = True) -> Batch:
    """Three sequences of eleven tokens for the small shapes above."""
    return reference.random_batch(GPT2, 3, 11, seed, documents)


def case_seed(name: str) -> int:
    """Return a seed that differs between the cases; a failing test prints it."""
    seed = 1000 + sum(name.encode())
    print(f"seed {seed}")
    return seed


def op_case(name: str, seed: int) -> Case:
    """Return the operation of that name, one of OPERATIONS, on random inputs of odd sizes."""
    return CASES[name](np.random.default_rng(seed), small_batch(seed))


def column_linear_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [random.standard_normal(size) for size in [(7, 5), (3, 5), (3,)]],
        ops.column_linear_forward,
        lambda dy, x, weight, bias: ops.column_linear_backward(dy, x, weight),
    )


def row_linear_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [random.standard_normal(size) for size in [(7, 5), (5, 3), (3,)]],
        ops.row_linear_forward,
        lambda dy, x, weight, bias: ops.row_linear_backward(dy, x, weight),
    )


def layernorm_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [random.standard_normal((7, 5)) + 0.5, random.standard_normal(5), random.standard_normal(5)],
        lambda x, weight, bias: ops.layernorm_forward(x, weight, bias, LARGE_EPS),
        lambda dy, x, weight, bias: ops.layernorm_backward(dy, x, weight, LARGE_EPS),
    )


def rmsnorm_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [random.standard_normal((7, 5)) + 0.5, random.standard_normal(5)],
        lambda x, weight: ops.rmsnorm_forward(x, weight, LARGE_EPS),
        lambda dy, x, weight: ops.rmsnorm_backward(dy, x, weight, LARGE_EPS),
    )


def gelu_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [2.0 * random.standard_normal((7, 5))],
        ops.gelu_forward,
        lambda dy, x: [ops.gelu_backward(dy, x)],
    )


def swiglu_case(random: np.random.Generator, batch: Batch) -> Case:
    inputs = [2.0 * random.standard_normal((7, 5)), random.standard_normal((7, 5))]
    return Case(inputs, ops.swiglu_forward, ops.swiglu_backward)


def rope_case(random: np.random.Generator, batch: Batch) -> Case:
    frequencies = ops.rope_frequencies(6, 100.0)
    return Case(
        [random.standard_normal((batch.tokens.size, 3 * 6))],
        lambda x: ops.rope_forward(x, batch.positions, frequencies),
        lambda dy, x: [ops.rope_backward(dy, batch.positions, frequencies)],
    )


def embedding_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [random.standard_normal((GPT2.vocabulary, 5)), random.standard_normal((GPT2.context, 5))],
        lambda table, learned: ops.embedding_forward(batch.tokens, batch.positions, table, learned),
        lambda dy, table, learned: [
            ops.embedding_backward(dy, batch.tokens, GPT2.vocabulary),
            ops.embedding_backward(dy, batch.positions, GPT2.context),
        ],
    )


def cross_entropy_case(random: np.random.Generator, batch: Batch) -> Case:
    return Case(
        [2.0 * random.standard_normal((batch.tokens.size, GPT2.vocabulary))],
        lambda logits: np.array(ops.cross_entropy_forward(logits, batch.targets)[0]),
        lambda dy, logits: [ops.cross_entropy_backward(float(dy), logits, batch.targets)],
    )


def attention_case(
    random: np.random.Generator, batch: Batch, heads: int = 3, kv_heads: int = 3, head_size: int = 4
) -> Case:
    counts = (heads, kv_heads, kv_heads)
    return Case(
        [random.standard_normal((batch.tokens.size, count * head_size)) for count in counts],
        lambda q, k, v: ops.attention_forward(q, k, v, heads, kv_heads, batch.length, batch.document_starts),
        lambda dy, q, k, v: ops.attention_backward(dy, q, k, v, heads, kv_heads, batch.length, batch.document_starts),
    )


CASES: dict[str, Callable[[np.random.Generator, Batch], Case]] = {
    "column linear": column_linear_case,
    "row linear": row_linear_case,
    "layernorm": layernorm_case,
    "rmsnorm": rmsnorm_case,
    "gelu": gelu_case,
    "swiglu": swiglu_case,
    "rope": rope_case,
    "embedding": embedding_case,
    "cross-entropy": cross_entropy_case,
    "attention": attention_case,
    "attention, odd head": partial(attention_case, heads=2, kv_heads=2, head_size=5),
    "attention, grouped": partial(attention_case, heads=6, kv_heads=2),
}
OPERATIONS = list(CASES)
