#include "shim/selftest.h"

#include "core/check.h"
#include "hip/common.h"
#include "hip/hip_device.h"

namespace pytrain::shim {

using namespace hip;

namespace {

void run(const std::function<void(hipStream_t)>& queue_work) {
    hipStream_t queue = nullptr;
    check_hip(hipStreamCreateWithFlags(&queue, hipStreamNonBlocking), "cannot create a stream");
    queue_work(queue);
    const hipError_t outcome = hipStreamSynchronize(queue);
    static_cast<void>(hipStreamDestroy(queue));
    check_hip(outcome, "the self-test failed");
}

PYTRAIN_KERNEL reverse_kernel(float* values, bool with_barrier) {
    PYTRAIN_SHARED(float, room, kThreads);
    room[thread_index()] = values[thread_index()];
    if (with_barrier) hip::barrier();
    values[thread_index()] = room[kThreads - 1 - thread_index()];
}

PYTRAIN_KERNEL divergent_barrier_kernel() {
    if (thread_index() != 7) hip::barrier();
}

PYTRAIN_KERNEL divergent_shuffle_kernel() {
    if (thread_index() != 7) static_cast<void>(hip::shuffle_xor(1.0f, 1));
}

PYTRAIN_KERNEL large_lds_kernel() {
    PYTRAIN_SHARED(float, room, 20000);
    room[thread_index()] = 0.0f;
}

// a (32, 16), b (16, 32) as 32-bit words that hold the format's bits; one call of multiply, or two for fp32.
template <Format format>
PYTRAIN_KERNEL matrix_kernel(const float* a, const float* b, float* c) {
    constexpr int elements = format == Format::fp32 ? 4 : 8;
    const int line = lane_index() % 32, half = lane_index() / 32;
    hip::Sums sums = {};
    for (int begin = 0; begin < 16; begin += 2 * elements) {
        Chunk left = {}, right = {};
        for (int e = 0; e < elements; ++e) {
            const int k = begin + half * elements + e;
            const float x = a[line * 16 + k], y = b[k * 32 + line];
            if constexpr (format == Format::fp32) {
                left[e] = bits_of(x);
                right[e] = bits_of(y);
            } else {
                const DType dtype = format == Format::bf16 ? DType::bf16 : DType::fp16;
                left[e / 2] |= static_cast<std::uint32_t>(narrowed(x, dtype)) << (16 * (e % 2));
                right[e / 2] |= static_cast<std::uint32_t>(narrowed(y, dtype)) << (16 * (e % 2));
            }
        }
        sums = multiply<format>(left, right, sums);
    }
    if (wave_index() != 0) return;
    for (int g = 0; g < 16; ++g) c[(8 * (g / 4) + 4 * half + g % 4) * 32 + line] = sums[g];
}

}  // namespace

std::vector<float> reverse(std::vector<float> values, bool with_barrier) {
    check(values.size() == kThreads, "reverse takes ", kThreads, " values");
    float* const data = values.data();
    run([=](hipStream_t queue) { PYTRAIN_LAUNCH(reverse_kernel, dim3(1), queue, data, with_barrier); });
    return values;
}

void diverge(const std::string& kind) {
    run([&](hipStream_t queue) {
        if (kind == "barrier")
            PYTRAIN_LAUNCH(divergent_barrier_kernel, dim3(1), queue, );
        else if (kind == "shuffle")
            PYTRAIN_LAUNCH(divergent_shuffle_kernel, dim3(1), queue, );
        else
            PYTRAIN_LAUNCH(large_lds_kernel, dim3(1), queue, );
    });
}

std::vector<float> matrix_product(const std::vector<float>& a, const std::vector<float>& b, const std::string& format) {
    check(a.size() == 512 && b.size() == 512, "matrix_product takes (32, 16) and (16, 32)");
    std::vector<float> c(1024);
    const float *left = a.data(), *right = b.data();
    float* const out = c.data();
    run([&](hipStream_t queue) {
        if (format == "bf16")
            PYTRAIN_LAUNCH(matrix_kernel<Format::bf16>, dim3(1), queue, left, right, out);
        else if (format == "fp16")
            PYTRAIN_LAUNCH(matrix_kernel<Format::fp16>, dim3(1), queue, left, right, out);
        else
            PYTRAIN_LAUNCH(matrix_kernel<Format::fp32>, dim3(1), queue, left, right, out);
    });
    return c;
}

}  // namespace pytrain::shim
