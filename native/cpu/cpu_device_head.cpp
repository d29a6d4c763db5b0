// Cross-entropy of the CPU device, from logits of a chunk of rows and a slice of the vocabulary.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/cpu_device.h"
#include "cpu/pieces.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

constexpr std::int64_t kIgnored = -1;  // target of a row that the loss leaves out
// Rows of one task of loss_forward, and how many tasks its shared scratch holds sums of.
constexpr std::int64_t kLossTasks = 1024;
constexpr std::int64_t kLeastLossRows = 256;

struct LossSum {
    double loss, count;
};
static_assert(sizeof(LossSum) * kLossTasks <= 64 * 2 * kPiece * sizeof(float), "rows_workspace(0) must hold the sums");

// log-sum-exp and loss of one row from the statistics of its slices, merged in order.
struct RowLoss {
    double lse, loss;
};

RowLoss merge_slices(const float* statistics, std::int64_t slices, std::int64_t rows, std::int64_t row) {
    double maximum = -std::numeric_limits<double>::infinity();
    for (std::int64_t slice = 0; slice < slices; ++slice)
        maximum = std::max(maximum, static_cast<double>(statistics[(slice * rows + row) * kHeadStatistics]));
    double sum = 0.0;
    double target = 0.0;
    for (std::int64_t slice = 0; slice < slices; ++slice) {
        const float* const of_slice = statistics + (slice * rows + row) * kHeadStatistics;
        sum += static_cast<double>(of_slice[1]) * std::exp(static_cast<double>(of_slice[0]) - maximum);
        target += static_cast<double>(of_slice[2]);
    }
    const double lse = maximum + std::log(sum);
    return {lse, lse - target};
}

}  // namespace

void CpuDevice::head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                                std::int64_t width, std::int64_t vocabulary_begin, Queue*) {
    const std::int64_t step = rows_per_task(width);
    parallel_for(workspace_.threads(), ceil_div(rows, step), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        float* const powers = scratch + kPiece;
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
            const std::int64_t first = row * width;
            float maximum = -std::numeric_limits<float>::infinity();
            for (std::int64_t column = 0; column < width; column += kPiece) {
                const std::int64_t n = std::min(kPiece, width - column);
                maximum =
                    std::max(maximum, kernels_.maximum(read_row(kernels_, logits, first + column, n, scratch), n));
            }
            // While the exponentials are computed, memory is asked for the row whose maximum this thread will look for.
            const std::int64_t next = row + (step == 1 ? workspace_.threads() : 1);
            const std::int64_t ahead = logits.dtype == DType::fp32 && next < rows ? (next - row) * width : 0;
            double sum = 0.0;
            for (std::int64_t column = 0; column < width; column += kPiece) {
                const std::int64_t n = std::min(kPiece, width - column);
                const float* const x = read_row(kernels_, logits, first + column, n, scratch);
                sum += static_cast<double>(kernels_.exp_sum(powers, x, x + ahead, 1.0f, maximum, n));
            }
            const std::int64_t target = targets[row] - vocabulary_begin;
            const bool here = targets[row] != kIgnored && target >= 0 && target < width;
            float* const out = statistics + row * kHeadStatistics;
            out[0] = maximum;
            out[1] = static_cast<float>(sum);
            out[2] = here ? *read_row(kernels_, logits, first + target, 1, scratch) : 0.0f;
        }
    });
}

void CpuDevice::loss_forward(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                             const std::int32_t* targets, std::int64_t rows, Queue*) {
    const std::int64_t step = std::max(kLeastLossRows, ceil_div(rows, kLossTasks));
    const std::int64_t tasks = ceil_div(rows, step);
    auto* const sums = reinterpret_cast<LossSum*>(workspace_.shared());
    parallel_for(workspace_.threads(), tasks, [=](std::int64_t task, int) {
        LossSum sum{0.0, 0.0};
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
            const RowLoss merged = merge_slices(statistics, slices, rows, row);
            lse[row] = static_cast<float>(merged.lse);
            if (targets[row] == kIgnored) continue;
            sum.loss += merged.loss;
            sum.count += 1.0;
        }
        sums[task] = sum;
    });
    for (std::int64_t task = 0; task < tasks; ++task) {
        scalars->loss_sum += sums[task].loss;
        scalars->target_count += sums[task].count;
    }
}

void CpuDevice::loss_backward(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                              const std::int32_t* targets, const StepScalars* scalars, std::int64_t rows,
                              std::int64_t width, std::int64_t vocabulary_begin, Queue*) {
    const float scale = static_cast<float>(scalars->gradient_scale);
    const std::int64_t step = rows_per_task(width);
    parallel_for(workspace_.threads(), ceil_div(rows, step), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row)
            for (std::int64_t column = 0; column < width; column += kPiece) {
                const std::int64_t n = std::min(kPiece, width - column);
                const std::int64_t out = row * ld_dlogits + column;
                // A piece is read whole before it is written, and ends no later there than here: rows may overlap.
                const float* const x = read_row(kernels_, logits, row * width + column, n, scratch);
                float* const values = output_row(dlogits, out, scratch);
                if (targets[row] == kIgnored) {
                    std::fill(values, values + n, 0.0f);
                } else {
                    kernels_.exp_sum(values, x, x + n, 1.0f, lse[row], n);
                    const std::int64_t target = targets[row] - vocabulary_begin - column;
                    if (target >= 0 && target < n) values[target] -= 1.0f;
                    kernels_.scale(values, scale, n);
                }
                write_row(kernels_, dlogits, out, n, values);
            }
    });
}

}  // namespace pytrain::cpu
