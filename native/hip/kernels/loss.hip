// Cross-entropy of a chunk of rows and a slice of the vocabulary. Bound by memory: statistics read the logits twice
// (the second time mostly from L2), backward reads them and writes their gradients once; about 20 FLOPs per logit.
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

constexpr std::int32_t kIgnored = -1;  // target of a row that the loss leaves out
constexpr std::int64_t kBlockStride = std::int64_t{kThreads} * kOctet;

// A block takes a row: maximum, sum of exp(logit - maximum), target logit. NaN is passed over by the maximum and comes
// back through the sum.
PYTRAIN_KERNEL head_statistics_kernel(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t width,
                                      std::int64_t vocabulary_begin) {
    PYTRAIN_SHARED(float, room, 2 * kThreads);
    const std::int64_t row = block_index(), first = row * width;
    float largest = -INFINITY;
    for (std::int64_t column = thread_index() * kOctet; column < width; column += kBlockStride) {
        const Octet octet = load_octet(logits, first + column, width - column);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j)
            if (j < width - column) largest = fmaxf(largest, octet.value[j]);
    }
    largest = block_maximum(largest, room);
    float sum = 0.0f;
    for (std::int64_t column = thread_index() * kOctet; column < width; column += kBlockStride) {
        const Octet octet = load_octet(logits, first + column, width - column);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j)
            if (j < width - column) sum += expf(octet.value[j] - largest);
    }
    sum = block_sum(sum, room + kThreads);
    if (thread_index() != 0) return;
    const std::int64_t target = targets[row] - vocabulary_begin;
    const bool here = targets[row] != kIgnored && target >= 0 && target < width;
    float* const out = statistics + row * kHeadStatistics;
    out[0] = largest;
    out[1] = sum;
    out[2] = here ? load(logits, first + target) : 0.0f;
}

// One block for all rows: a thread takes every 256th row, then the threads' float64 sums are added as a tree.
PYTRAIN_KERNEL loss_forward_kernel(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                                   const std::int32_t* targets, std::int64_t rows) {
    PYTRAIN_SHARED(double, room, 2 * kThreads);
    double loss = 0.0, count = 0.0;
    for (std::int64_t row = thread_index(); row < rows; row += kThreads) {
        double largest = -INFINITY;
        for (std::int64_t slice = 0; slice < slices; ++slice)
            largest = fmax(largest, static_cast<double>(statistics[(slice * rows + row) * kHeadStatistics]));
        double sum = 0.0, target = 0.0;
        for (std::int64_t slice = 0; slice < slices; ++slice) {
            const float* const of_slice = statistics + (slice * rows + row) * kHeadStatistics;
            sum += static_cast<double>(of_slice[1]) * exp(static_cast<double>(of_slice[0]) - largest);
            target += static_cast<double>(of_slice[2]);
        }
        const double total = largest + log(sum);
        lse[row] = static_cast<float>(total);
        if (targets[row] == kIgnored) continue;
        loss += total - target;
        count += 1.0;
    }
    loss = block_sum(loss, room);
    count = block_sum(count, room + kThreads);
    if (thread_index() != 0) return;
    scalars->loss_sum += loss;
    scalars->target_count += count;
}

// A block takes a row: dlogits = (softmax - onehot(target)) * gradient_scale, 0 where the target is ignored. Rows of
// dlogits may lie over those of logits, 16 bits over fp32 too. What the block writes in a round ends no later than what
// it read in that round, so the barrier between the two is enough.
PYTRAIN_KERNEL loss_backward_kernel(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                                    const std::int32_t* targets, const StepScalars* scalars, std::int64_t width,
                                    std::int64_t vocabulary_begin) {
    const std::int64_t row = block_index();
    const float scale = static_cast<float>(scalars->gradient_scale), shift = lse[row];
    const bool ignored = targets[row] == kIgnored;
    for (std::int64_t first = 0; first < width; first += kBlockStride) {
        const std::int64_t column = first + thread_index() * kOctet, left = width - column;
        const std::int64_t target = targets[row] - vocabulary_begin - column;
        Octet octet = load_octet(logits, row * width + column, left);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) {
            const float probability = expf(octet.value[j] - shift) - (j == target ? 1.0f : 0.0f);
            octet.value[j] = ignored ? 0.0f : probability * scale;
        }
        barrier();
        store_octet(dlogits, row * ld_dlogits + column, left, octet);
    }
}

void launch_head_statistics(float* statistics, Tensor logits, const std::int32_t* targets, std::int64_t rows,
                            std::int64_t width, std::int64_t vocabulary_begin, hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(rows));
    if (rows > 0)
        PYTRAIN_LAUNCH(head_statistics_kernel, blocks, queue, statistics, logits, targets, width, vocabulary_begin);
}

void launch_loss_forward(StepScalars* scalars, float* lse, const float* statistics, std::int64_t slices,
                         const std::int32_t* targets, std::int64_t rows, hipStream_t queue) {
    PYTRAIN_LAUNCH(loss_forward_kernel, dim3(1), queue, scalars, lse, statistics, slices, targets, rows);
}

void launch_loss_backward(Tensor dlogits, std::int64_t ld_dlogits, Tensor logits, const float* lse,
                          const std::int32_t* targets, const StepScalars* scalars, std::int64_t rows,
                          std::int64_t width, std::int64_t vocabulary_begin, hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(rows));
    if (rows > 0)
        PYTRAIN_LAUNCH(loss_backward_kernel, blocks, queue, dlogits, ld_dlogits, logits, lse, targets, scalars, width,
                       vocabulary_begin);
}

}  // namespace pytrain::hip
