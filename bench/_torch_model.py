"""GPT-2 and LLaMA in plain PyTorch, the way they are usually written: the peer of `bench.step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention by scaled_dot_product_attention, grouped-query where there are fewer KV heads."""

    def __init__(self, model: Mapping[str, Any], length: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_size = model["heads"], model["kv_heads"], model["head_size"]
        biased = model["family"] == "gpt2"
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        self.sizes = [query, key, key]
        self.qkv = nn.Linear(model["hidden"], sum(self.sizes), bias=biased)
        self.out = nn.Linear(query, model["hidden"], bias=biased)
        self.rotary = not biased
        if self.rotary:
            half = self.head_size // 2
            frequencies = model["rope_theta"] ** (-torch.arange(half) / half)
            angles = torch.outer(torch.arange(length), frequencies)
            self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), 1), persistent=False)
            self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, -1, self.head_size).transpose(1, 2) for part in self.qkv(x).split(self.sizes, 2)
        )
        if self.rotary:
            q, k = self.rotated(q), self.rotated(k)
        grouped = self.kv_heads != self.heads
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions, rotate-half."""
        first, second = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat((-second, first), -1) * self.sin.to(x.dtype)


class FeedForward(nn.Module):
    """GELU (tanh) for GPT-2, SwiGLU for LLaMA."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, ffn = model["hidden"], model["ffn"]
        self.gated = model["family"] == "llama"
        self.up = nn.Linear(hidden, 2 * ffn if self.gated else ffn, bias=not self.gated)
        self.down = nn.Linear(ffn, hidden, bias=not self.gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        if self.gated:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(functional.silu(gate) * up)
        return self.down(functional.gelu(self.up(x), approximate="tanh"))


def norm(model: Mapping[str, Any]) -> nn.Module:
    """LayerNorm for GPT-2, RMSNorm for LLaMA."""
    kind = nn.LayerNorm if model["family"] == "gpt2" else nn.RMSNorm
    return kind(model["hidden"], eps=model["norm_eps"])


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, model: Mapping[str, Any], length: int) -> None:
        super().__init__()
        self.norm1, self.attention = norm(model), Attention(model, length)
        self.norm2, self.mlp = norm(model), FeedForward(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The whole model with its loss.

    Args:
        model: the keys of a `pytrain.config.ModelConfig`.
        length: tokens per sequence.
    """

    def __init__(self, model: Mapping[str, Any], length: int) -> None:
        super().__init__()
        hidden = model["hidden"]
        self.tokens = nn.Embedding(model["vocabulary"], hidden)
        self.positions = nn.Embedding(model["context"], hidden) if model["family"] == "gpt2" else None
        self.layers = nn.ModuleList(Layer(model, length) for _ in range(model["layers"]))
        self.norm = norm(model)
        self.head = nn.Linear(hidden, model["vocabulary"], bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=model["init_std"])
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if model["tied_head"]:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats of targets (B, T) after tokens (B, T)."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
