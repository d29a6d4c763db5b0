// The vocabulary of generic/*.inl for SVE of any vector length. Meanings: scalar/simd.h.
//
// An SVE vector has no size that the compiler knows: it can be a local variable and an argument, but not an element of
// an array, a member, or captured by value. kLanes is therefore no constant; it reads the vector length wherever it is
// used (one CNTW, which the compiler moves out of loops).
#pragma once
#include <arm_sve.h>

#include <cstdint>

namespace pytrain::cpu::sve {
namespace {

using V = svfloat32_t;

struct LaneCount {
    operator std::int64_t() const { return static_cast<std::int64_t>(svcntw()); }
};
constexpr LaneCount kLanes{};
constexpr std::int64_t kMostLanes = 64;  // 2048 bits
constexpr bool kSideBySide = false;

inline svbool_t all() { return svptrue_b32(); }
inline svbool_t lanes(std::int64_t n) { return svwhilelt_b32_s64(0, n); }  // the first n, or all where there are fewer

inline V set(float x) { return svdup_n_f32(x); }
inline V load(const float* p) { return svld1_f32(all(), p); }
inline V load_n(const float* p, std::int64_t n, float fill) {
    return svsel_f32(lanes(n), svld1_f32(lanes(n), p), set(fill));
}
inline void store(float* p, V x) { svst1_f32(all(), p, x); }
inline void store_n(float* p, V x, std::int64_t n) { svst1_f32(lanes(n), p, x); }
inline V keep_n(V x, std::int64_t n) { return svsel_f32(lanes(n), x, set(0.0f)); }

inline V add(V a, V b) { return svadd_f32_x(all(), a, b); }
inline V sub(V a, V b) { return svsub_f32_x(all(), a, b); }
inline V mul(V a, V b) { return svmul_f32_x(all(), a, b); }
inline V fma(V a, V b, V c) { return svmla_f32_x(all(), c, a, b); }
// A comparison and a choice: FMIN and FMAX would return NaN where either operand is NaN.
inline V min(V a, V b) { return svsel_f32(svcmplt_f32(all(), a, b), a, b); }
inline V max(V a, V b) { return svsel_f32(svcmpgt_f32(all(), a, b), a, b); }

// Division and square root by the estimates of 8 bits that the architecture defines, each Newton step of which doubles
// the bits: the A64FX takes 98 cycles for a vector of quotients, in which it does 196 multiply-adds. Errors: 2 units in
// the last place. The steps' instructions are defined such that a / infinity is 0 and a / 0 infinity.
inline V div(V a, V b) {
    V inverse = svrecpe_f32(b);
    inverse = mul(inverse, svrecps_f32(b, inverse));
    inverse = mul(inverse, svrecps_f32(b, inverse));
    inverse = mul(inverse, svrecps_f32(b, inverse));
    return mul(a, inverse);
}
inline V square_root(V x) {
    V inverse = svrsqrte_f32(x);
    inverse = mul(inverse, svrsqrts_f32(x, mul(inverse, inverse)));
    inverse = mul(inverse, svrsqrts_f32(x, mul(inverse, inverse)));
    inverse = mul(inverse, svrsqrts_f32(x, mul(inverse, inverse)));
    // 0 and infinity equal twice themselves and are their own roots.
    return svsel_f32(svcmpeq_f32(all(), x, add(x, x)), x, mul(x, inverse));
}
inline V round_to_integer(V x) { return svrintn_f32_x(all(), x); }
inline V scale_by_power(V x, V n) { return svscale_f32_x(all(), x, svcvt_s32_f32_x(all(), n)); }

// By the hardware's tree, whose shape the vector length decides.
inline float reduce_add(V x) { return svaddv_f32(all(), x); }
inline float reduce_max(V x) { return svmaxv_f32(all(), x); }

// The conversion reads the even lanes; a shift brings the odd ones there.
using D = svfloat64_t;
inline D double_zeros() { return svdup_n_f64(0.0); }
inline D even_lanes(V x) { return svcvt_f64_f32_x(svptrue_b64(), x); }
inline D odd_lanes(V x) {
    const svuint64_t pairs = svlsr_n_u64_x(svptrue_b64(), svreinterpret_u64_f32(x), 32);
    return svcvt_f64_f32_x(svptrue_b64(), svreinterpret_f32_u64(pairs));
}
inline void add_products(D& first, D& second, V a, V b) {
    first = svmla_f64_x(svptrue_b64(), first, even_lanes(a), even_lanes(b));
    second = svmla_f64_x(svptrue_b64(), second, odd_lanes(a), odd_lanes(b));
}
inline double total_of(D first, D second) {
    return svaddv_f64(svptrue_b64(), svadd_f64_x(svptrue_b64(), first, second));
}

// load_where reads the lanes of a mask and gives 0 in the others.
struct Fp32 {
    using Element = float;
    static V load_where(svbool_t mask, const Element* p) { return svld1_f32(mask, p); }
    static V load(const Element* p) { return load_where(all(), p); }
    static V load_n(const Element* p, std::int64_t n) { return load_where(lanes(n), p); }
    static void store(Element* p, V x) { sve::store(p, x); }
    static void store_n(Element* p, V x, std::int64_t n) { sve::store_n(p, x, n); }
};

// 16-bit elements are loaded into the lower, and stored from the lower half of 32-bit lanes.
// bf16 in integer arithmetic: the A64FX has no bf16 instructions.
struct Bf16 {
    using Element = std::uint16_t;
    static V widen(svuint32_t bits) { return svreinterpret_f32_u32(svlsl_n_u32_x(all(), bits, 16)); }
    // Round to nearest even by adding just under half a unit, or just half where the unit's bit is set.
    static svuint32_t narrow(V x) {
        const svuint32_t bits = svreinterpret_u32_f32(x);
        const svuint32_t odd = svand_n_u32_x(all(), svlsr_n_u32_x(all(), bits, 16), 1);
        const svuint32_t rounded = svadd_u32_x(all(), svadd_n_u32_x(all(), bits, 0x7fff), odd);
        const svuint32_t nan = svorr_n_u32_x(all(), bits, 0x400000);
        return svlsr_n_u32_x(all(), svsel_u32(svcmpuo_f32(all(), x, x), nan, rounded), 16);
    }
    static V load_where(svbool_t mask, const Element* p) { return widen(svld1uh_u32(mask, p)); }
    static V load(const Element* p) { return load_where(all(), p); }
    static V load_n(const Element* p, std::int64_t n) { return load_where(lanes(n), p); }
    static void store(Element* p, V x) { svst1h_u32(all(), p, narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { svst1h_u32(lanes(n), p, narrow(x)); }
};

struct Fp16 {
    using Element = std::uint16_t;
    static V widen(svuint32_t bits) { return svcvt_f32_f16_x(all(), svreinterpret_f16_u32(bits)); }
    static svuint32_t narrow(V x) { return svreinterpret_u32_f16(svcvt_f16_f32_x(all(), x)); }
    static V load_where(svbool_t mask, const Element* p) { return widen(svld1uh_u32(mask, p)); }
    static V load(const Element* p) { return load_where(all(), p); }
    static V load_n(const Element* p, std::int64_t n) { return load_where(lanes(n), p); }
    static void store(Element* p, V x) { svst1h_u32(all(), p, narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { svst1h_u32(lanes(n), p, narrow(x)); }
};

}  // namespace
}  // namespace pytrain::cpu::sve
