// bf16 and fp16 scalars, in integer arithmetic: the same bits on every CPU, whatever its rounding or flush mode.
// Everything here has internal linkage, so that files built for one instruction set may include it (see cpu/kernels.h).
#pragma once
#include <cstdint>
#include <cstring>

namespace pytrain {

static inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float bf16_to_float(std::uint16_t value) { return float_of(static_cast<std::uint32_t>(value) << 16); }

// Round to nearest even. NaN stays NaN (quiet, with the upper bits of its payload).
static inline std::uint16_t float_to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x0040u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float fp16_to_float(std::uint16_t value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000u) << 16;
    const std::uint32_t exponent = (value >> 10) & 0x1fu;
    const std::uint32_t mantissa = value & 0x3ffu;
    if (exponent == 0x1fu) return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x00400000u : 0u));
    if (exponent != 0) return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal in fp16, exact and normal in fp32
    return float_of(sign | bits_of(magnitude));
}

// Round to nearest even, subnormals included; overflow becomes infinity, NaN stays NaN.
static inline std::uint16_t float_to_fp16(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t result;
    if (magnitude > 0x7f800000u) {
        result = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520: halfway from the largest fp16 to the next power
        result = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14: the smallest normal fp16
        result = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    } else if (magnitude > 0x33000000u) {  // above 2^-25, half of the smallest subnormal
        const std::uint32_t shift = 126u - (magnitude >> 23);
        const std::uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        result = (mantissa + (1u << (shift - 1u)) - 1u + ((mantissa >> shift) & 1u)) >> shift;
    } else {
        result = 0;
    }
    return static_cast<std::uint16_t>(sign | result);
}

}  // namespace pytrain
