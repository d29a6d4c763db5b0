"""The weights of a model as a table, and the files they are in: what disk and Hugging Face need to know.

The names and shapes are those of `native/model/layout.cpp` for one process (a test compares the two); the
order is that of the flat buckets.
"""

from typing import TYPE_CHECKING

from pytrain.checkpoint.pieces import TensorEntry

if TYPE_CHECKING:
    from pytrain.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def weight_entries(model: "ModelConfig", dtype: str) -> list[TensorEntry]:
    """Every weight of the model, with its global shape, in the files "<bucket>.weights"."""
    buckets = {"embed": _embed_shapes(model)}
    for layer in range(model.layers):
        shapes = _layer_shapes(model)
        buckets[f"layer_{layer:03d}"] = {f"layer.{layer}.{name}": shape for name, shape in shapes.items()}
    buckets["head"] = _head_shapes(model)
    return [
        TensorEntry(f"{bucket}.weights", name, dtype, shape)
        for bucket, shapes in buckets.items()
        for name, shape in shapes.items()
    ]


def _embed_shapes(model: "ModelConfig") -> Shapes:
    shapes: Shapes = {"embed.tokens": (model.vocabulary, model.hidden)}
    if model.family == "gpt2":
        shapes["embed.positions"] = (model.context, model.hidden)
    return shapes


def _head_shapes(model: "ModelConfig") -> Shapes:
    shapes = _norm_shapes(model, "final_norm")
    if not model.tied_head:
        shapes["head.weight"] = (model.vocabulary, model.hidden)
    return shapes


def _norm_shapes(model: "ModelConfig", name: str) -> Shapes:
    parts = ("weight", "bias") if model.family == "gpt2" else ("weight",)
    return {f"{name}.{part}": (model.hidden,) for part in parts}


def _layer_shapes(model: "ModelConfig") -> Shapes:
    hidden, ffn, biased = model.hidden, model.ffn, model.family == "gpt2"
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads}
    shapes = _norm_shapes(model, "norm1")
    shapes |= {f"attention.{part}.weight": (n * model.head_size, hidden) for part, n in heads.items()}
    if biased:
        shapes |= {f"attention.{part}.bias": (n * model.head_size,) for part, n in heads.items()}
    shapes["attention.out.weight"] = (model.heads * model.head_size, hidden)
    if biased:
        shapes["attention.out.bias"] = (hidden,)
    shapes |= _norm_shapes(model, "norm2")
    if not biased:
        shapes["mlp.gate.weight"] = (ffn, hidden)
    shapes["mlp.up.weight"] = (ffn, hidden)
    if biased:
        shapes["mlp.up.bias"] = (ffn,)
    shapes["mlp.down.weight"] = (ffn, hidden)
    if biased:
        shapes["mlp.down.bias"] = (hidden,)
    return shapes
