"""One table for both directions: which of their tensors are made of which of ours.

Ours are stored with the dimension first that tensor parallelism cuts: [out, in] where the output is cut, [in,
out] for `attention.out` and `mlp.down`. transformers keeps LLaMA's matrices [out, in] and GPT-2's [in, out],
and GPT-2's q, k and v as one.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytrain.config import ModelConfig


class Match(NamedTuple):
    """Their tensor is ours, joined along the first axis and then transposed if `transposed`."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool


# Inside a layer: their name, our names, transposed or not.
_LLAMA_LAYER = (
    ("input_layernorm.weight", ("norm1.weight",), False),
    ("self_attn.q_proj.weight", ("attention.q.weight",), False),
    ("self_attn.k_proj.weight", ("attention.k.weight",), False),
    ("self_attn.v_proj.weight", ("attention.v.weight",), False),
    ("self_attn.o_proj.weight", ("attention.out.weight",), True),
    ("post_attention_layernorm.weight", ("norm2.weight",), False),
    ("mlp.gate_proj.weight", ("mlp.gate.weight",), False),
    ("mlp.up_proj.weight", ("mlp.up.weight",), False),
    ("mlp.down_proj.weight", ("mlp.down.weight",), True),
)
_GPT2_LAYER = (
    ("ln_1.weight", ("norm1.weight",), False),
    ("ln_1.bias", ("norm1.bias",), False),
    ("attn.c_attn.weight", ("attention.q.weight", "attention.k.weight", "attention.v.weight"), True),
    ("attn.c_attn.bias", ("attention.q.bias", "attention.k.bias", "attention.v.bias"), False),
    ("attn.c_proj.weight", ("attention.out.weight",), False),
    ("attn.c_proj.bias", ("attention.out.bias",), False),
    ("ln_2.weight", ("norm2.weight",), False),
    ("ln_2.bias", ("norm2.bias",), False),
    ("mlp.c_fc.weight", ("mlp.up.weight",), True),
    ("mlp.c_fc.bias", ("mlp.up.bias",), False),
    ("mlp.c_proj.weight", ("mlp.down.weight",), False),
    ("mlp.c_proj.bias", ("mlp.down.bias",), False),
)
_LLAMA_OUTER = (
    ("model.embed_tokens.weight", "embed.tokens"),
    ("model.norm.weight", "final_norm.weight"),
)
_GPT2_OUTER = (
    ("transformer.wte.weight", "embed.tokens"),
    ("transformer.wpe.weight", "embed.positions"),
    ("transformer.ln_f.weight", "final_norm.weight"),
    ("transformer.ln_f.bias", "final_norm.bias"),
)
HEAD = "lm_head.weight"

# Buffers that older versions of transformers saved among the weights; nothing is lost without them.
IGNORED = {"llama": (".rotary_emb.inv_freq",), "gpt2": (".attn.bias", ".attn.masked_bias")}


def matches(model: "ModelConfig") -> list[Match]:
    """Every tensor of the transformers model of this shape."""
    gpt2 = model.family == "gpt2"
    block = "transformer.h" if gpt2 else "model.layers"
    found = [Match(theirs, (ours,), False) for theirs, ours in (_GPT2_OUTER if gpt2 else _LLAMA_OUTER)]
    for layer in range(model.layers):
        found += [
            Match(f"{block}.{layer}.{theirs}", tuple(f"layer.{layer}.{name}" for name in ours), transposed)
            for theirs, ours, transposed in (_GPT2_LAYER if gpt2 else _LLAMA_LAYER)
        ]
    if not model.tied_head:
        found.append(Match(HEAD, ("head.weight",), False))
    return found
