// Causal attention within documents, in tiles: the matrix of scores never exists.
#pragma once
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/workspace.h"
#include "device.h"

namespace pytrain::cpu {

WorkspaceNeed attention_workspace(const Kernels& kernels, std::int64_t head_size);

// See Attention in device.h; scores are scaled by 1/sqrt(head_size). Dao et al., "FlashAttention", 2022.
// FLOPs: 4*head_size per visible (query, key) pair, which bind.
void attention_forward(const Kernels& kernels, Workspace& workspace, const Attention& attention);

// From q, k, v, out, lse and dout: dq, dk, dv, overwritten whole. delta (batch, heads, query_rows) is scratch.
// FLOPs: 14*head_size per visible pair by tiles, 10*head_size by heads (see attention_backward.cpp).
void attention_backward(const Kernels& kernels, Workspace& workspace, const Attention& attention, Tensor dq, Tensor dk,
                        Tensor dv, Tensor dout, float* delta);

}  // namespace pytrain::cpu
