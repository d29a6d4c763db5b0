// Conversions, sums and fills, element by element, eight to a thread. Bound by memory: bytes are those of the operands,
// at most 2 FLOPs each (fill_normal: about 100 per element, still under the memory's rate of fp64).
#include "hip/common.h"
#include "hip/kernels.h"

namespace pytrain::hip {

constexpr std::int64_t kBlockElements = std::int64_t{kThreads} * kOctet;

PYTRAIN_INLINE std::int64_t first_element() { return (block_index() * kThreads + thread_index()) * kOctet; }
inline dim3 blocks_for(std::int64_t n) { return dim3(static_cast<unsigned>(ceil_div(n, kBlockElements))); }

PYTRAIN_KERNEL convert_kernel(Tensor destination, Tensor source, std::int64_t n) {
    const std::int64_t i = first_element();
    if (i < n) store_octet(destination, i, n - i, load_octet(source, i, n - i));
}

PYTRAIN_KERNEL add_kernel(Tensor destination, Tensor source, std::int64_t n) {
    const std::int64_t i = first_element();
    if (i >= n) return;
    Octet sum = load_octet(destination, i, n - i);
    const Octet term = load_octet(source, i, n - i);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) sum.value[j] += term.value[j];
    store_octet(destination, i, n - i, sum);
}

PYTRAIN_KERNEL fill_kernel(Tensor destination, std::int64_t n, float value) {
    const std::int64_t i = first_element();
    if (i >= n) return;
    Octet octet;
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) octet.value[j] = value;
    store_octet(destination, i, n - i, octet);
}

// Blocks of four numbers begin at multiples of 4 of the whole tensor's index, whatever part of it this is.
PYTRAIN_KERNEL fill_normal_kernel(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key,
                                  std::int64_t first, float deviation) {
    const std::int64_t block = first / 4 + block_index() * kThreads + thread_index();
    if (4 * block >= first + n) return;
    const auto normals = philox_normals(seed, key, static_cast<std::uint64_t>(block));
    for (int j = 0; j < 4; ++j) {
        const std::int64_t i = 4 * block + j - first;
        if (i >= 0 && i < n)
            store(destination, i,
                  static_cast<float>(static_cast<double>(deviation) * normals[static_cast<std::size_t>(j)]));
    }
}

// x += partial [+ bias]: octets of a row, so that the bias is read by chunks as well.
PYTRAIN_KERNEL residual_add_kernel(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width) {
    const std::int64_t octets = ceil_div(width, kOctet);
    const std::int64_t task = block_index() * kThreads + thread_index();
    if (task >= rows * octets) return;
    const std::int64_t column = task % octets * kOctet, n = width - column;
    const std::int64_t i = task / octets * width + column;
    Octet sum = load_octet(x, i, n);
    const Octet term = load_octet(partial, i, n);
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) sum.value[j] += term.value[j];
    if (bias.data != nullptr) {
        const Octet offset = load_octet(bias, column, n);
        PYTRAIN_UNROLL
        for (int j = 0; j < kOctet; ++j) sum.value[j] += offset.value[j];
    }
    store_octet(x, i, n, sum);
}

void launch_convert(Tensor destination, Tensor source, std::int64_t n, hipStream_t queue) {
    if (n > 0) PYTRAIN_LAUNCH(convert_kernel, blocks_for(n), queue, destination, source, n);
}
void launch_add(Tensor destination, Tensor source, std::int64_t n, hipStream_t queue) {
    if (n > 0) PYTRAIN_LAUNCH(add_kernel, blocks_for(n), queue, destination, source, n);
}
void launch_fill(Tensor destination, std::int64_t n, float value, hipStream_t queue) {
    if (n > 0) PYTRAIN_LAUNCH(fill_kernel, blocks_for(n), queue, destination, n, value);
}
void launch_fill_normal(Tensor destination, std::int64_t n, std::uint64_t seed, std::uint64_t key, std::int64_t first,
                        float deviation, hipStream_t queue) {
    if (n == 0) return;
    const std::int64_t blocks = ceil_div((first + n - 1) / 4 - first / 4 + 1, kThreads);
    PYTRAIN_LAUNCH(fill_normal_kernel, dim3(static_cast<unsigned>(blocks)), queue, destination, n, seed, key, first,
                   deviation);
}
void launch_residual_add(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width,
                         hipStream_t queue) {
    const std::int64_t blocks = ceil_div(rows * ceil_div(width, kOctet), kThreads);
    if (blocks > 0)
        PYTRAIN_LAUNCH(residual_add_kernel, dim3(static_cast<unsigned>(blocks)), queue, x, partial, bias, rows, width);
}

}  // namespace pytrain::hip
