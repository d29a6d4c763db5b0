// Cross-entropy of the CPU device, from logits of a chunk of rows and a slice of the vocabulary.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"
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

// Statistics of row `row` of a slice: out (3), and the sum as it was before it was rounded. The exponentials go to
// `powers` (kPiece) a piece after the other, or where that is none over the logits, which are fp32 then. Meanwhile
// memory is asked for the row that lies `ahead` elements further on.
double row_statistics(const Kernels& kernels, float* out, Tensor logits, std::int64_t row, std::int64_t width,
                      std::int64_t target, std::int64_t ahead, float* scratch, float* powers) {
    const std::int64_t first = row * width;
    float maximum = -std::numeric_limits<float>::infinity();
    for (std::int64_t column = 0; column < width; column += kPiece) {
        const std::int64_t n = std::min(kPiece, width - column);
        maximum = std::max(maximum, kernels.maximum(read_row(kernels, logits, first + column, n, scratch), n));
    }
    out[0] = maximum;
    out[2] = target >= 0 && target < width ? *read_row(kernels, logits, first + target, 1, scratch) : 0.0f;
    double sum = 0.0;
    for (std::int64_t column = 0; column < width; column += kPiece) {
        const std::int64_t n = std::min(kPiece, width - column);
        const float* const x = read_row(kernels, logits, first + column, n, scratch);
        float* const y = powers != nullptr ? powers : static_cast<float*>(logits.at(first + column).data);
        sum += static_cast<double>(kernels.exp_sum(y, x, x + ahead, 1.0f, maximum, n));
    }
    out[1] = static_cast<float>(sum);
    return sum;
}

// How far the row lies whose logits this thread will need next, in elements; 0 where it has none, or they are not fp32.
std::int64_t elements_ahead(Tensor logits, std::int64_t row, std::int64_t rows, std::int64_t width, int threads) {
    const std::int64_t next = row + (rows_per_task(width) == 1 ? threads : 1);
    return logits.dtype == DType::fp32 && next < rows ? (next - row) * width : 0;
}

}  // namespace

void CpuDevice::head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                                std::int64_t width, std::int64_t vocabulary_begin, Queue*) {
    const std::int64_t step = rows_per_task(width);
    parallel_for(workspace_.threads(), ceil_div(rows, step), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
            const std::int64_t target = targets[row] == kIgnored ? kIgnored : targets[row] - vocabulary_begin;
            row_statistics(kernels_, statistics + row * kHeadStatistics, logits, row, width, target,
                           elements_ahead(logits, row, rows, width, workspace_.threads()), scratch, scratch + kPiece);
        }
    });
}

// A row of 50,000 logits stays in the second-level cache from its maximum to its gradient: one pass over memory for
// what is three passes otherwise, and one exponential an element for two. 22 FLOPs, 8 bytes per element; memory binds.
void CpuDevice::loss_forward_backward(StepScalars* scalars, float* lse, float* statistics, Tensor dlogits,
                                      std::int64_t ld_dlogits, Tensor logits, const std::int32_t* targets,
                                      std::int64_t rows, std::int64_t width, Queue* queue) {
    check(logits.dtype == DType::fp32, "loss_forward_backward: logits must be fp32, not ", name_of(logits.dtype));
    const double scale = scalars->gradient_scale;
    const std::int64_t step = rows_per_task(width);
    parallel_for(workspace_.threads(), ceil_div(rows, step), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
            const std::int64_t target = targets[row];
            const double sum =
                row_statistics(kernels_, statistics + row * kHeadStatistics, logits, row, width, target,
                               elements_ahead(logits, row, rows, width, workspace_.threads()), scratch, nullptr);
            auto* const powers = static_cast<float*>(logits.at(row * width).data);
            for (std::int64_t column = 0; column < width; column += kPiece) {
                const std::int64_t n = std::min(kPiece, width - column), out = row * ld_dlogits + column;
                const bool here = target >= column && target < column + n;
                const double chosen = here ? static_cast<double>(powers[target]) / sum - 1.0 : 0.0;
                // 16-bit gradients may lie over the beginning of the row. Of its pieces only the first would be written
                // where it is read.
                float* const beside = column == 0 ? scratch : powers + column;
                float* const values = output_row(dlogits, out, beside);
                if (values != powers + column)
                    std::memcpy(values, powers + column, static_cast<std::size_t>(n) * sizeof(float));
                kernels_.scale(values, static_cast<float>(scale / sum), n);
                if (here) values[target - column] = static_cast<float>(chosen * scale);
                if (target == kIgnored) std::fill(values, values + n, 0.0f);
                write_row(kernels_, dlogits, out, n, values);
            }
        }
    });
    loss_forward(scalars, lse, statistics, 1, targets, rows, queue);
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
