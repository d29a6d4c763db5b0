// What kernels share: typed loads and stores, sums over a wave and a block.
#pragma once
#include "hip/compat.h"

namespace pytrain::hip {

PYTRAIN_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// --- one element --------------------------------------------------------------------------------------------------

PYTRAIN_INLINE float widened(std::uint16_t bits, DType dtype) {
    return dtype == DType::bf16 ? bf16_to_float(bits) : half_to_float(bits);
}
PYTRAIN_INLINE std::uint16_t narrowed(float value, DType dtype) {
    return dtype == DType::bf16 ? float_to_bf16(value) : float_to_half(value);
}

PYTRAIN_INLINE float load(const Tensor& x, std::int64_t i) {
    if (x.dtype == DType::fp32) return static_cast<const float*>(x.data)[i];
    return widened(static_cast<const std::uint16_t*>(x.data)[i], x.dtype);
}
PYTRAIN_INLINE void store(const Tensor& x, std::int64_t i, float value) {
    if (x.dtype == DType::fp32)
        static_cast<float*>(x.data)[i] = value;
    else
        static_cast<std::uint16_t*>(x.data)[i] = narrowed(value, x.dtype);
}

// --- eight neighbours ---------------------------------------------------------------------------------------------
// One 16-byte access for 16-bit types, two for fp32, where the address allows it.

constexpr int kOctet = 8;

struct Octet {
    float value[kOctet];
};

PYTRAIN_INLINE bool on_16_bytes(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

PYTRAIN_INLINE const char* address_of(const Tensor& x, std::int64_t i) {
    return static_cast<const char*>(x.data) + i * static_cast<std::int64_t>(x.dtype == DType::fp32 ? 4 : 2);
}

// Elements [i, i + n), n <= 8; the others are 0.
PYTRAIN_INLINE Octet load_octet(const Tensor& x, std::int64_t i, std::int64_t n) {
    Octet octet;
    const char* const address = address_of(x, i);
    if (n >= kOctet && on_16_bytes(address)) {
        const Chunk first = load_16(address);
        if (x.dtype == DType::fp32) {
            const Chunk second = load_16(address + 16);
            PYTRAIN_UNROLL
            for (int j = 0; j < 4; ++j) {
                octet.value[j] = float_of(first[j]);
                octet.value[4 + j] = float_of(second[j]);
            }
        } else {
            PYTRAIN_UNROLL
            for (int j = 0; j < 4; ++j) {
                octet.value[2 * j] = widened(static_cast<std::uint16_t>(first[j]), x.dtype);
                octet.value[2 * j + 1] = widened(static_cast<std::uint16_t>(first[j] >> 16), x.dtype);
            }
        }
        return octet;
    }
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j) octet.value[j] = j < n ? load(x, i + j) : 0.0f;
    return octet;
}

PYTRAIN_INLINE void store_octet(const Tensor& x, std::int64_t i, std::int64_t n, const Octet& octet) {
    char* const address = const_cast<char*>(address_of(x, i));
    if (n >= kOctet && on_16_bytes(address)) {
        Chunk first, second;
        if (x.dtype == DType::fp32) {
            PYTRAIN_UNROLL
            for (int j = 0; j < 4; ++j) {
                first[j] = bits_of(octet.value[j]);
                second[j] = bits_of(octet.value[4 + j]);
            }
            store_16(address, first);
            store_16(address + 16, second);
        } else {
            PYTRAIN_UNROLL
            for (int j = 0; j < 4; ++j)
                first[j] = narrowed(octet.value[2 * j], x.dtype) |
                           static_cast<std::uint32_t>(narrowed(octet.value[2 * j + 1], x.dtype)) << 16;
            store_16(address, first);
        }
        return;
    }
    PYTRAIN_UNROLL
    for (int j = 0; j < kOctet; ++j)
        if (j < n) store(x, i + j, octet.value[j]);
}

// --- sums: every lane or thread gets the same bits, from one order of addition ---------------------------------------

PYTRAIN_INLINE float wave_sum(float value) {
    PYTRAIN_UNROLL
    for (int mask = kWave / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

PYTRAIN_INLINE float wave_maximum(float value) {
    PYTRAIN_UNROLL
    for (int mask = kWave / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
    return value;
}

// Over the block; `room` is LDS of kThreads values, of this call alone: free again only after another barrier.
template <class Value>
PYTRAIN_INLINE Value block_sum(Value value, Value* room) {
    const int thread = thread_index();
    room[thread] = value;
    barrier();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (thread < half) room[thread] += room[thread + half];
        barrier();
    }
    return room[0];
}

PYTRAIN_INLINE float block_maximum(float value, float* room) {
    const int thread = thread_index();
    room[thread] = value;
    barrier();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (thread < half) room[thread] = fmaxf(room[thread], room[thread + half]);
        barrier();
    }
    return room[0];
}

// --- activations ----------------------------------------------------------------------------------------------------

PYTRAIN_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// GELU in its tanh form: x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
constexpr float kGeluLinear = 1.5957691216057308f;  // 2 sqrt(2/pi)
constexpr float kGeluCubic = 0.044715f;

PYTRAIN_INLINE float gelu(float x) { return x * sigmoid(kGeluLinear * x * (1.0f + kGeluCubic * x * x)); }

PYTRAIN_INLINE float gelu_slope(float x) {
    // Beyond 30 the slope is 0 or 1 to the last bit, while x^3 could overflow and meet a 0. NaN stays NaN.
    const float value = x > 30.0f ? 30.0f : x < -30.0f ? -30.0f : x;
    const float s = sigmoid(kGeluLinear * value * (1.0f + kGeluCubic * value * value));
    return s + value * s * (1.0f - s) * kGeluLinear * (1.0f + 3.0f * kGeluCubic * value * value);
}

}  // namespace pytrain::hip
