// The vocabulary of generic/*.inl for one lane of plain C++: the definition that every other simd.h follows.
//
// V holds kLanes floats. fma may round once or twice. min and max return the second operand where either is NaN.
// load_n and store_n touch the first n < kLanes elements; the other lanes load as `fill`.
#pragma once
#include <cstdint>

#include "core/half.h"

namespace pytrain::cpu::scalar {
namespace {

using V = float;
constexpr std::int64_t kLanes = 1;
constexpr std::int64_t kMostLanes = kLanes;  // room for a vector of any length that this instruction set may have
constexpr bool kSideBySide = false;          // whether long chains take vectors in pairs

inline V set(float x) { return x; }
inline V load(const float* p) { return *p; }
inline V load_n(const float* p, std::int64_t n, float fill) { return n > 0 ? *p : fill; }
inline void store(float* p, V x) { *p = x; }
inline void store_n(float* p, V x, std::int64_t n) {
    if (n > 0) *p = x;
}
inline V keep_n(V x, std::int64_t n) { return n > 0 ? x : 0.0f; }  // the first n lanes, 0 in the others

inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V square_root(V x) { return __builtin_sqrtf(x); }

// Adding and taking away 1.5 * 2^23 leaves no bits below the point; |x| < 2^22.
inline V round_to_integer(V x) { return (x + 12582912.0f) - 12582912.0f; }

// x * 2^n for an integer n in [-150, 128], in two steps so that neither factor overflows or is subnormal.
inline V scale_by_power(V x, V n) {
    const std::int32_t power = n == n ? static_cast<std::int32_t>(n) : 0;
    const std::int32_t half = power / 2;
    const float first = float_of(static_cast<std::uint32_t>(half + 127) << 23);
    const float second = float_of(static_cast<std::uint32_t>(power - half + 127) << 23);
    return x * first * second;
}

inline float reduce_add(V x) { return x; }
inline float reduce_max(V x) { return x; }

// Sums of products of floats in float64: first and second take half of the lanes each.
using D = double;
inline D double_zeros() { return 0.0; }
inline void add_products(D& first, D&, V a, V b) { first += static_cast<double>(a) * static_cast<double>(b); }
inline double total_of(D first, D second) { return first + second; }

// How a storage type is read and written.
struct Fp32 {
    using Element = float;
    static V load(const Element* p) { return *p; }
    static V load_n(const Element* p, std::int64_t n) { return n > 0 ? *p : 0.0f; }
    static void store(Element* p, V x) { *p = x; }
    static void store_n(Element* p, V x, std::int64_t n) { scalar::store_n(p, x, n); }
};
struct Bf16 {
    using Element = std::uint16_t;
    static V load(const Element* p) { return bf16_to_float(*p); }
    static V load_n(const Element* p, std::int64_t n) { return n > 0 ? bf16_to_float(*p) : 0.0f; }
    static void store(Element* p, V x) { *p = float_to_bf16(x); }
    static void store_n(Element* p, V x, std::int64_t n) {
        if (n > 0) *p = float_to_bf16(x);
    }
};
struct Fp16 {
    using Element = std::uint16_t;
    static V load(const Element* p) { return fp16_to_float(*p); }
    static V load_n(const Element* p, std::int64_t n) { return n > 0 ? fp16_to_float(*p) : 0.0f; }
    static void store(Element* p, V x) { *p = float_to_fp16(x); }
    static void store_n(Element* p, V x, std::int64_t n) {
        if (n > 0) *p = float_to_fp16(x);
    }
};

}  // namespace
}  // namespace pytrain::cpu::scalar
