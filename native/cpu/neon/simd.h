// The vocabulary of generic/*.inl for NEON (any armv8-a): four lanes. Meanings: scalar/simd.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>

namespace pytrain::cpu::neon {
namespace {

using V = float32x4_t;
constexpr std::int64_t kLanes = 4;
constexpr std::int64_t kMostLanes = kLanes;
constexpr bool kSideBySide = true;

// All bits of the first n lanes: the four words from kLaneMask + 4 - n on.
constexpr std::uint32_t kLaneMask[8] = {~0u, ~0u, ~0u, ~0u, 0, 0, 0, 0};
inline uint32x4_t lanes(std::int64_t n) { return vld1q_u32(kLaneMask + kLanes - n); }

inline V set(float x) { return vdupq_n_f32(x); }
inline V load(const float* p) { return vld1q_f32(p); }
// NEON has no masked load or store: tails go through a full vector on the stack.
inline V load_n(const float* p, std::int64_t n, float fill) {
    float tail[kLanes] = {fill, fill, fill, fill};
    for (std::int64_t i = 0; i < n; ++i) tail[i] = p[i];
    return load(tail);
}
inline void store(float* p, V x) { vst1q_f32(p, x); }
inline void store_n(float* p, V x, std::int64_t n) {
    float tail[kLanes];
    store(tail, x);
    for (std::int64_t i = 0; i < n; ++i) p[i] = tail[i];
}
inline V keep_n(V x, std::int64_t n) { return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), lanes(n))); }

inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
// A comparison and a choice: FMIN and FMAX would return NaN where either operand is NaN.
inline V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline V square_root(V x) { return vsqrtq_f32(x); }
inline V round_to_integer(V x) { return vrndnq_f32(x); }

inline V scale_by_power(V x, V n) {
    const int32x4_t power = vcvtq_s32_f32(n);
    const int32x4_t half = vshrq_n_s32(power, 1);
    const int32x4_t bias = vdupq_n_s32(127);
    const int32x4_t first = vshlq_n_s32(vaddq_s32(half, bias), 23);
    const int32x4_t second = vshlq_n_s32(vaddq_s32(vsubq_s32(power, half), bias), 23);
    return mul(mul(x, vreinterpretq_f32_s32(first)), vreinterpretq_f32_s32(second));
}

inline float reduce_add(V x) { return vaddvq_f32(x); }  // lanes 0 and 1, 2 and 3, then both
inline float reduce_max(V x) { return vmaxvq_f32(x); }

using D = float64x2_t;
inline D double_zeros() { return vdupq_n_f64(0.0); }
inline void add_products(D& first, D& second, V a, V b) {
    first = vfmaq_f64(first, vcvt_f64_f32(vget_low_f32(a)), vcvt_f64_f32(vget_low_f32(b)));
    second = vfmaq_f64(second, vcvt_high_f64_f32(a), vcvt_high_f64_f32(b));
}
inline double total_of(D first, D second) { return vaddvq_f64(vaddq_f64(first, second)); }

struct Fp32 {
    using Element = float;
    static V load(const Element* p) { return neon::load(p); }
    static V load_n(const Element* p, std::int64_t n) { return neon::load_n(p, n, 0.0f); }
    static void store(Element* p, V x) { neon::store(p, x); }
    static void store_n(Element* p, V x, std::int64_t n) { neon::store_n(p, x, n); }
};

struct Half {
    using Element = std::uint16_t;
    static uint16x4_t load_bits_n(const Element* p, std::int64_t n) {
        Element tail[kLanes] = {};
        for (std::int64_t i = 0; i < n; ++i) tail[i] = p[i];
        return vld1_u16(tail);
    }
    static void store_bits_n(Element* p, uint16x4_t bits, std::int64_t n) {
        Element tail[kLanes];
        vst1_u16(tail, bits);
        for (std::int64_t i = 0; i < n; ++i) p[i] = tail[i];
    }
};

// In integer arithmetic: armv8-a has no bf16 instructions.
struct Bf16 : Half {
    static V widen(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
    // Round to nearest even by adding just under half a unit, or just half where the unit's bit is set.
    static uint16x4_t narrow(V x) {
        const uint32x4_t bits = vreinterpretq_u32_f32(x);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        const uint32x4_t nan = vorrq_u32(bits, vdupq_n_u32(0x400000));
        return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, nan), 16);
    }
    static V load(const Element* p) { return widen(vld1_u16(p)); }
    static V load_n(const Element* p, std::int64_t n) { return widen(load_bits_n(p, n)); }
    static void store(Element* p, V x) { vst1_u16(p, narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { store_bits_n(p, narrow(x), n); }
};

struct Fp16 : Half {
    static V widen(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
    static uint16x4_t narrow(V x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
    static V load(const Element* p) { return widen(vld1_u16(p)); }
    static V load_n(const Element* p, std::int64_t n) { return widen(load_bits_n(p, n)); }
    static void store(Element* p, V x) { vst1_u16(p, narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { store_bits_n(p, narrow(x), n); }
};

}  // namespace
}  // namespace pytrain::cpu::neon
