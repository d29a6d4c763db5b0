// Norms, and sums over rows. Bound by memory: forward moves 2 elements per element, backward 4 and, for dweight and
// dbias, 2 more in a second pass over columns.
//
// A wave takes a row. Sums over rows are cut into at most kRowChunks chunks by shape alone; a chunk's rows are added in
// order, then the chunks in order: no atomics, the same bits every time.
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

constexpr std::int64_t kLeastChunkRows = 32;
constexpr int kColumns = 64;                    // of a block that sums over rows
constexpr int kRowLanes = kThreads / kColumns;  // rows that it reads at once
constexpr std::int64_t kWaveElements = kWave * kOctet;

inline std::int64_t rows_of_chunk(std::int64_t rows) {
    const std::int64_t step = ceil_div(rows, kRowChunks);
    return step > kLeastChunkRows ? step : kLeastChunkRows;
}

// sum over a row of f(column, octet of x), the same in every lane.
template <class Function>
PYTRAIN_INLINE float row_sum(std::int64_t width, Function function) {
    float sum = 0.0f;
    for (std::int64_t column = lane_index() * kOctet; column < width; column += kWaveElements)
        sum += function(column, width - column);
    return wave_sum(sum);
}

PYTRAIN_INLINE float octet_sum(const Octet& octet) {
    float sum = 0.0f;
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) sum += octet.value[j];
    return sum;
}

// (x - mean) rstd, and 0 beyond the row's end.
PYTRAIN_INLINE Octet normalised(const Tensor& x, std::int64_t i, std::int64_t n, float mean, float rstd) {
    Octet octet = load_octet(x, i, n);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) octet.value[j] = j < n ? (octet.value[j] - mean) * rstd : 0.0f;
    return octet;
}

// Two passes for the statistics: no cancellation where |mean| is much larger than the deviation.
PYTRAIN_KERNEL norm_forward_kernel(Norm norm, Tensor y) {
    const std::int64_t row = block_index() * kWaves + wave_index(), width = norm.width, first = row * width;
    if (row >= norm.rows) return;
    const bool centered = norm.kind == NormKind::layernorm;
    const float count = static_cast<float>(width);
    float mean = 0.0f;
    if (centered)
        mean = row_sum(width, [&](std::int64_t column,
                                  std::int64_t n) { return octet_sum(load_octet(norm.x, first + column, n)); }) /
               count;
    const float variance = row_sum(width,
                                   [&](std::int64_t column, std::int64_t n) {
                                       Octet octet = normalised(norm.x, first + column, n, mean, 1.0f);
                                       PYTRAIN_UNROLL
                                       for (int j = 0; j < kOctet; ++j) octet.value[j] *= octet.value[j];
                                       return octet_sum(octet);
                                   }) /
                           count;
    const float rstd = 1.0f / sqrtf(variance + norm.eps);
    for (std::int64_t column = lane_index() * kOctet; column < width; column += kWaveElements) {
        const std::int64_t n = width - column;
        Octet out = normalised(norm.x, first + column, n, mean, rstd);
        const Octet weight = load_octet(norm.weight, column, n);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) out.value[j] *= weight.value[j];
        if (centered) {
            const Octet bias = load_octet(norm.bias, column, n);
            PYTRAIN_UNROLL
            for (int j = 0; j < kOctet; ++j) out.value[j] += bias.value[j];
        }
        store_octet(y, first + column, n, out);
    }
    if (lane_index() != 0) return;
    norm.rstd[row] = rstd;
    if (centered) norm.mean[row] = mean;
}

// With h = (x - mean) rstd and g = dy weight: dx += rstd (g - mean(g) - h mean(g h)); without mean(g) for an RMSNorm.
PYTRAIN_KERNEL norm_backward_kernel(Norm norm, Tensor dx, Tensor dy) {
    const std::int64_t row = block_index() * kWaves + wave_index(), width = norm.width, first = row * width;
    if (row >= norm.rows) return;
    const bool centered = norm.kind == NormKind::layernorm;
    const float mean = centered ? norm.mean[row] : 0.0f, rstd = norm.rstd[row], count = static_cast<float>(width);
    const auto gradient = [&](std::int64_t column, std::int64_t n) {
        Octet g = load_octet(dy, first + column, n);
        const Octet weight = load_octet(norm.weight, column, n);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) g.value[j] *= weight.value[j];
        return g;
    };
    float average = 0.0f;
    if (centered)
        average =
            row_sum(width, [&](std::int64_t column, std::int64_t n) { return octet_sum(gradient(column, n)); }) / count;
    const float average_normal = row_sum(width,
                                         [&](std::int64_t column, std::int64_t n) {
                                             Octet g = gradient(column, n);
                                             const Octet h = normalised(norm.x, first + column, n, mean, rstd);
                                             PYTRAIN_UNROLL
                                             for (int j = 0; j < kOctet; ++j) g.value[j] *= h.value[j];
                                             return octet_sum(g);
                                         }) /
                                 count;
    for (std::int64_t column = lane_index() * kOctet; column < width; column += kWaveElements) {
        const std::int64_t n = width - column;
        const Octet g = gradient(column, n), h = normalised(norm.x, first + column, n, mean, rstd);
        Octet sum = load_octet(dx, first + column, n);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) sum.value[j] += rstd * (g.value[j] - average - h.value[j] * average_normal);
        store_octet(dx, first + column, n, sum);
    }
}

// One chunk of rows, one block of columns: what kRowLanes rows at a time add up to, lane by lane, then over the lanes
// in order. `term(row, column)` gives what is summed; `room` is of this call alone.
template <class Term>
PYTRAIN_INLINE float column_sum(std::int64_t begin, std::int64_t end, std::int64_t column, bool inside, float* room,
                                Term term) {
    const int lane_row = thread_index() / kColumns, lane_column = thread_index() % kColumns;
    float sum = 0.0f;
    if (inside)
        for (std::int64_t row = begin + lane_row; row < end; row += kRowLanes) sum += term(row, column);
    room[thread_index()] = sum;
    barrier();
    float total = 0.0f;
    for (int i = 0; i < kRowLanes; ++i) total += room[i * kColumns + lane_column];
    return total;
}

PYTRAIN_KERNEL norm_sums_kernel(Norm norm, Tensor dy, float* partials, std::int64_t step) {
    PYTRAIN_SHARED(float, room, 2 * kThreads);
    const std::int64_t column = block_index() * kColumns + thread_index() % kColumns, chunk = block_row();
    const std::int64_t begin = chunk * step, end = least(norm.rows, begin + step), width = norm.width;
    const bool centered = norm.kind == NormKind::layernorm, inside = column < width;
    const float weight = column_sum(begin, end, column, inside, room, [&](std::int64_t row, std::int64_t at) {
        const float h = (load(norm.x, row * width + at) - (centered ? norm.mean[row] : 0.0f)) * norm.rstd[row];
        return load(dy, row * width + at) * h;
    });
    const float bias = column_sum(begin, end, column, inside && centered, room + kThreads,
                                  [&](std::int64_t row, std::int64_t at) { return load(dy, row * width + at); });
    if (!inside || thread_index() >= kColumns) return;
    partials[(chunk * 2) * width + column] = weight;
    partials[(chunk * 2 + 1) * width + column] = bias;
}

PYTRAIN_KERNEL bias_sums_kernel(Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, float* partials,
                                std::int64_t step) {
    PYTRAIN_SHARED(float, room, kThreads);
    const std::int64_t column = block_index() * kColumns + thread_index() % kColumns, chunk = block_row();
    const std::int64_t begin = chunk * step, end = least(m, begin + step);
    const float sum = column_sum(begin, end, column, column < n, room,
                                 [&](std::int64_t row, std::int64_t at) { return load(dy, row * ldy + at); });
    if (column < n && thread_index() < kColumns) partials[chunk * n + column] = sum;
}

// gradient (n) += the chunks' sums, in order; they lie `stride` apart.
PYTRAIN_KERNEL add_chunks_kernel(Tensor gradient, const float* partials, std::int64_t n, std::int64_t stride,
                                 std::int64_t chunks) {
    const std::int64_t column = block_index() * kThreads + thread_index();
    if (column >= n) return;
    float total = 0.0f;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) total += partials[chunk * stride + column];
    store(gradient, column, load(gradient, column) + total);
}

void launch_add_chunks(Tensor gradient, const float* partials, std::int64_t n, std::int64_t stride, std::int64_t chunks,
                       hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(ceil_div(n, kThreads)));
    PYTRAIN_LAUNCH(add_chunks_kernel, blocks, queue, gradient, partials, n, stride, chunks);
}

void launch_norm_forward(const Norm& norm, Tensor y, hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(ceil_div(norm.rows, kWaves)));
    if (norm.rows > 0) PYTRAIN_LAUNCH(norm_forward_kernel, blocks, queue, norm, y);
}

void launch_norm_backward(const Norm& norm, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, float* partials,
                          hipStream_t queue) {
    if (norm.rows == 0) return;
    const dim3 blocks(static_cast<unsigned>(ceil_div(norm.rows, kWaves)));
    PYTRAIN_LAUNCH(norm_backward_kernel, blocks, queue, norm, dx, dy);
    const std::int64_t step = rows_of_chunk(norm.rows), chunks = ceil_div(norm.rows, step);
    const dim3 tiles(static_cast<unsigned>(ceil_div(norm.width, kColumns)), static_cast<unsigned>(chunks));
    PYTRAIN_LAUNCH(norm_sums_kernel, tiles, queue, norm, dy, partials, step);
    launch_add_chunks(dweight, partials, norm.width, 2 * norm.width, chunks, queue);
    if (norm.kind == NormKind::layernorm)
        launch_add_chunks(dbias, partials + norm.width, norm.width, 2 * norm.width, chunks, queue);
}

void launch_bias_backward(Tensor dbias, Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, float* partials,
                          hipStream_t queue) {
    if (m == 0 || n == 0) return;
    const std::int64_t step = rows_of_chunk(m), chunks = ceil_div(m, step);
    const dim3 tiles(static_cast<unsigned>(ceil_div(n, kColumns)), static_cast<unsigned>(chunks));
    PYTRAIN_LAUNCH(bias_sums_kernel, tiles, queue, dy, m, n, ldy, partials, step);
    launch_add_chunks(dbias, partials, n, n, chunks, queue);
}

}  // namespace pytrain::hip
