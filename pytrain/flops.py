"""Arithmetic of a training step, counted the way the field counts it.

Per token, forward, a multiply and an add being two operations:

    layer   2 H (q + 2 k) + 2 q H    projections; q = heads * head_size, k = kv_heads * head_size
            2 s q                    scores and sums over v in a sequence of s tokens, halved: causal
            4 H F (gpt2), 6 H F (llama)
    head    2 H V                    once, tied or not

Forward and backward together are three times that. Norms, activations, the embedding and the optimizer are
not counted, nor is that document boundaries shorten attention. With q = H this is Megatron-LM's formula,
4 H^2 (1 + k/q) + 2 s H + ... per layer. Model FLOPs leave recomputation out and give MFU; hardware FLOPs
count it and give HFU.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytrain.config import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward operations per token, by part of the model."""

    projections: int
    """q, k, v and output products of all layers."""
    attention: int
    """Scores and weighted sums of all layers, causal."""
    mlp: int
    """Feed-forward products of all layers."""
    head: int
    """Logits."""

    @property
    def layers(self) -> int:
        """All that the layers do."""
        return self.projections + self.attention + self.mlp


def forward_flops(model: "ModelConfig", sequence_length: int) -> TokenFlops:
    """Forward operations per token in sequences of `sequence_length` tokens."""
    query, key = model.heads * model.head_size, model.kv_heads * model.head_size
    matrices = 2 if model.family == "gpt2" else 3
    return TokenFlops(
        projections=model.layers * 2 * model.hidden * (2 * query + 2 * key),
        attention=model.layers * 2 * sequence_length * query,
        mlp=model.layers * 2 * matrices * model.hidden * model.ffn,
        head=2 * model.hidden * model.vocabulary,
    )


def model_flops(model: "ModelConfig", sequence_length: int) -> int:
    """Model FLOPs per token of a training step: forward and backward, recomputation not counted."""
    forward = forward_flops(model, sequence_length)
    return 3 * (forward.layers + forward.head)


def hardware_flops(model: "ModelConfig", sequence_length: int, policy: str) -> int:
    """FLOPs per token including what the recompute policy ("none", "selective" or "full") does a second time.

    "selective" repeats attention, "full" the layers. Norms and activations, which all make again, count nothing.
    """
    forward = forward_flops(model, sequence_length)
    repeated = {"none": 0, "selective": forward.attention, "full": forward.layers}[policy]
    return model_flops(model, sequence_length) + repeated


def utilization(flops_per_second: float, peak_flops_per_second: float | None) -> float | None:
    """Share of the peak, 0 to 1 (MFU or HFU); None where the peak is not known, never a guess."""
    return None if peak_flops_per_second is None else flops_per_second / peak_flops_per_second
