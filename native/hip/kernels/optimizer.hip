// Gradient norm and AdamW. Bound by memory: sum_squares reads 1 element, AdamW moves 7 per element (8 with separate
// weights).
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

// partials[block] = sum of squares of the block's elements, in float64. How much a block takes hangs on n alone.
PYTRAIN_KERNEL sum_squares_kernel(double* partials, Tensor x, std::int64_t n, std::int64_t block_elements) {
    PYTRAIN_SHARED(double, room, kThreads);
    const std::int64_t begin = block_index() * block_elements, end = least(n, begin + block_elements);
    double sum = 0.0;
    for (std::int64_t i = begin + thread_index() * kOctet; i < end; i += std::int64_t{kThreads} * kOctet) {
        const Octet octet = load_octet(x, i, end - i);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j)
            sum += static_cast<double>(octet.value[j]) * static_cast<double>(octet.value[j]);
    }
    sum = block_sum(sum, room);
    if (thread_index() == 0) partials[block_index()] = sum;
}

PYTRAIN_KERNEL finish_sum_kernel(double* sum, const double* partials, std::int64_t blocks) {
    PYTRAIN_SHARED(double, room, kThreads);
    double total = 0.0;
    for (std::int64_t i = thread_index(); i < blocks; i += kThreads) total += partials[i];
    total = block_sum(total, room);
    if (thread_index() == 0) *sum += total;
}

PYTRAIN_KERNEL finish_norm_kernel(StepScalars* scalars, const double* sum, double limit, double loss_scale) {
    if (thread_index() != 0) return;
    const double norm = sqrt(*sum) / loss_scale;
    scalars->gradient_norm = norm;
    scalars->finite = norm <= 1.7976931348623157e308 ? 1.0 : 0.0;  // false for NaN, too
    scalars->clip_factor = (limit > 0.0 && norm > limit ? limit / norm : 1.0) / loss_scale;
}

PYTRAIN_KERNEL adamw_kernel(AdamW options, AdamWTensors tensors, std::int64_t n, const StepScalars* scalars) {
    const std::int64_t i = (block_index() * kThreads + thread_index()) * kOctet;
    if (i >= n || scalars->finite == 0.0) return;
    const float beta1 = static_cast<float>(options.beta1), beta2 = static_cast<float>(options.beta2);
    const float rest1 = static_cast<float>(1.0 - options.beta1), rest2 = static_cast<float>(1.0 - options.beta2);
    const float clip = static_cast<float>(scalars->clip_factor);
    Octet value = load_octet(tensors.master, i, n - i), mean = load_octet(tensors.m, i, n - i);
    Octet square = load_octet(tensors.v, i, n - i);
    const Octet gradient = load_octet(tensors.gradient, i, n - i);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) {
        const float g = gradient.value[j] * clip;
        mean.value[j] = beta1 * mean.value[j] + rest1 * g;
        square.value[j] = beta2 * square.value[j] + rest2 * (g * g);
        const float step =
            options.step_size * mean.value[j] / (sqrtf(square.value[j]) * options.correction2 + options.eps);
        value.value[j] = value.value[j] - options.decay * value.value[j] - step;
    }
    store_octet(tensors.master, i, n - i, value);
    store_octet(tensors.m, i, n - i, mean);
    store_octet(tensors.v, i, n - i, square);
    if (tensors.weights.data != tensors.master.data) store_octet(tensors.weights, i, n - i, value);
}

void launch_sum_squares(double* sum, Tensor x, std::int64_t n, double* partials, hipStream_t queue) {
    if (n == 0) return;
    const std::int64_t least_elements = std::int64_t{kThreads} * kOctet;
    const std::int64_t elements = ceil_div(ceil_div(n, kSumBlocks), least_elements) * least_elements;
    const std::int64_t blocks = ceil_div(n, elements);
    PYTRAIN_LAUNCH(sum_squares_kernel, dim3(static_cast<unsigned>(blocks)), queue, partials, x, n, elements);
    PYTRAIN_LAUNCH(finish_sum_kernel, dim3(1), queue, sum, partials, blocks);
}

void launch_finish_norm(StepScalars* scalars, const double* sum, double limit, double loss_scale, hipStream_t queue) {
    PYTRAIN_LAUNCH(finish_norm_kernel, dim3(1), queue, scalars, sum, limit, loss_scale);
}

void launch_adamw(const AdamW& options, const AdamWTensors& tensors, std::int64_t n, const StepScalars* scalars,
                  hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(ceil_div(n, std::int64_t{kThreads} * kOctet)));
    if (n > 0) PYTRAIN_LAUNCH(adamw_kernel, blocks, queue, options, tensors, n, scalars);
}

}  // namespace pytrain::hip
