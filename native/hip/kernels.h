// The kernels of the HIP device as host functions that queue them, one block of declarations per file of kernels/. What
// they do is said in device.h; `partials` is scratch on the device.
#pragma once
#include "device.h"
#include "hip/runtime.h"

namespace pytrain::hip {

// kernels/matmul.hip
constexpr std::int64_t kComputeUnits = 110;              // of one GCD of MI250X
constexpr std::int64_t kSplitTiles = 2 * kComputeUnits;  // tiles of sums, at most, of a product whose k is cut
constexpr std::int64_t kSplitFloats = kSplitTiles * 128 * 128;
// partials: (kSplitFloats)
void launch_matmul(const Matmul& product, float* partials, hipStream_t queue);
// What every product ends with, where its sums (m, n), rows `ld` apart, are there already. ld: a multiple of 128.
void launch_matmul_end(const Matmul& product, float* sums, std::int64_t ld, hipStream_t queue);

// kernels/attention_forward.hip, attention_backward.hip
constexpr std::int64_t kLargestHead = 256;
void launch_attention_forward(const Attention& attention, hipStream_t queue);
struct AttentionGradients {
    Tensor dq, dk, dv, dout;
    float* delta;
};
void launch_attention_backward(const Attention& attention, const AttentionGradients& gradients, hipStream_t queue);

// kernels/plain.hip
void launch_convert(Tensor destination, Tensor source, std::int64_t n, hipStream_t queue);
void launch_add(Tensor destination, Tensor source, std::int64_t n, hipStream_t queue);
void launch_fill(Tensor destination, std::int64_t n, float value, hipStream_t queue);
void launch_fill_normal(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key, std::int64_t first,
                        float deviation, hipStream_t queue);
void launch_residual_add(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width,
                         hipStream_t queue);

// kernels/activation.hip
void launch_gelu_forward(Tensor y, Tensor x, std::int64_t n, hipStream_t queue);
void launch_gelu_backward(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n, hipStream_t queue);
void launch_swiglu_forward(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width, hipStream_t queue);
void launch_swiglu_backward(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows, std::int64_t width,
                            hipStream_t queue);
struct Rope {
    Tensor x;
    std::int64_t rows, stride, heads, head_size;
    const std::int32_t* positions;
    const float* table;
    bool inverse;
};
void launch_rope(const Rope& rope, hipStream_t queue);

// kernels/norm.hip
constexpr std::int64_t kRowChunks = 64;  // sums over rows are cut in at most so many chunks, added in order
void launch_norm_forward(const Norm& norm, Tensor y, hipStream_t queue);
// partials: (kRowChunks, 2, width)
void launch_norm_backward(const Norm& norm, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, float* partials,
                          hipStream_t queue);
// partials: (kRowChunks, n)
void launch_bias_backward(Tensor dbias, Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, float* partials,
                          hipStream_t queue);

// kernels/embedding.hip
void launch_embed_forward(const Embed& embed, Tensor out, Tensor table, Tensor position_table, hipStream_t queue);
void launch_embed_backward(const Embed& embed, Tensor dtable, Tensor dposition_table, Tensor dout, hipStream_t queue);

// kernels/loss.hip
void launch_head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                            std::int64_t width, std::int64_t vocabulary_begin, hipStream_t queue);
void launch_loss_forward(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                         const std::int32_t* targets, std::int64_t rows, hipStream_t queue);
void launch_loss_backward(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                          const std::int32_t* targets, const StepScalars* scalars, std::int64_t rows,
                          std::int64_t width, std::int64_t vocabulary_begin, hipStream_t queue);

// kernels/optimizer.hip
constexpr std::int64_t kSumBlocks = 1024;
// partials: (kSumBlocks)
void launch_sum_squares(double* sum, Tensor x, std::int64_t n, double* partials, hipStream_t queue);
void launch_finish_norm(StepScalars* scalars, const double* sum, double limit, double loss_scale, hipStream_t queue);
struct AdamWTensors {
    Tensor weights, master, m, v, gradient;
};
void launch_adamw(const AdamW& options, const AdamWTensors& tensors, std::int64_t n, const StepScalars* scalars,
                  hipStream_t queue);

}  // namespace pytrain::hip
