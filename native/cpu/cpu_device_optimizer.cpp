// Gradient norm and AdamW of the CPU device. Both are bound by memory.
#include <algorithm>
#include <cmath>

#include "cpu/cpu_device.h"
#include "cpu/pieces.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

// Blocks of sum_squares: their number is bounded by the shared scratch that holds their sums.
constexpr std::int64_t kSumBlocks = 1024;
static_assert(sizeof(double) * kSumBlocks <= 64 * 2 * kPiece * sizeof(float), "rows_workspace(0) must hold the sums");

float narrowed(double value) { return static_cast<float>(value); }

}  // namespace

void CpuDevice::sum_squares(double* sum, Tensor x, std::int64_t n, Queue*) {
    const std::int64_t block = ceil_div(std::max(kTaskElements, ceil_div(n, kSumBlocks)), kPiece) * kPiece;
    const std::int64_t blocks = ceil_div(n, block);
    auto* const sums = reinterpret_cast<double*>(workspace_.shared());
    parallel_for(workspace_.threads(), blocks, [=](std::int64_t index, int thread) {
        double total = 0.0;
        const std::int64_t end = std::min(n, (index + 1) * block);
        for (std::int64_t first = index * block; first < end; first += kPiece) {
            const std::int64_t count = std::min(kPiece, end - first);
            total += kernels_.sum_squares(read_row(kernels_, x, first, count, workspace_.thread(thread)), count);
        }
        sums[index] = total;
    });
    for (std::int64_t index = 0; index < blocks; ++index) *sum += sums[index];
}

void CpuDevice::finish_norm(StepScalars* scalars, const double* sum, double limit, double loss_scale, Queue*) {
    const double norm = std::sqrt(*sum) / loss_scale;
    scalars->gradient_norm = norm;
    scalars->finite = std::isfinite(norm) ? 1.0 : 0.0;
    const double clip = limit > 0.0 && norm > limit ? limit / norm : 1.0;
    scalars->clip_factor = clip / loss_scale;
}

void CpuDevice::adamw(const AdamW& options, Tensor weights, Tensor master, Tensor m, Tensor v, Tensor gradient,
                      std::int64_t n, const StepScalars* scalars, Queue*) {
    if (scalars->finite == 0.0) return;
    const AdamWRow row = {narrowed(options.beta1),
                          narrowed(options.beta2),
                          narrowed(1.0 - options.beta1),
                          narrowed(1.0 - options.beta2),
                          options.eps,
                          options.step_size,
                          options.correction2,
                          options.decay,
                          narrowed(scalars->clip_factor)};
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        const std::int64_t first = piece.first;
        float* const value = update_row(kernels_, master, first, piece.n, piece.scratch(0));
        float* const mean = update_row(kernels_, m, first, piece.n, piece.scratch(1));
        float* const square = update_row(kernels_, v, first, piece.n, piece.scratch(2));
        const float* const slope = read_row(kernels_, gradient, first, piece.n, piece.scratch(3));
        void* const rounded = weights.data == master.data ? nullptr : weights.at(first).data;
        kernels_.adamw[static_cast<int>(weights.dtype)](rounded, value, mean, square, slope, piece.n, &row);
        write_row(kernels_, master, first, piece.n, value);
        write_row(kernels_, m, first, piece.n, mean);
        write_row(kernels_, v, first, piece.n, square);
    });
}

}  // namespace pytrain::cpu
