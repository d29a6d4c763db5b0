// The vocabulary of generic/*.inl for AVX2, FMA and F16C: eight lanes. Meanings: scalar/simd.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace pytrain::cpu::avx2 {
namespace {

using V = __m256;
constexpr std::int64_t kLanes = 8;
constexpr std::int64_t kMostLanes = kLanes;
constexpr bool kSideBySide = true;

// The mask of n lanes begins at kLaneMask + 8 - n.
constexpr std::int32_t kLaneMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i lanes(std::int64_t n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMask + 8 - n)); }

inline V set(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load_n(const float* p, std::int64_t n, float fill) {
    return _mm256_blendv_ps(set(fill), _mm256_maskload_ps(p, lanes(n)), _mm256_castsi256_ps(lanes(n)));
}
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline void store_n(float* p, V x, std::int64_t n) { _mm256_maskstore_ps(p, lanes(n), x); }
inline V keep_n(V x, std::int64_t n) { return _mm256_and_ps(x, _mm256_castsi256_ps(lanes(n))); }

inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm256_min_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V square_root(V x) { return _mm256_sqrt_ps(x); }
inline V round_to_integer(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline V scale_by_power(V x, V n) {
    const __m256i power = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(power, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(power, half), bias), 23);
    return mul(mul(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

// Halves are folded upon each other: lanes i and i+4, then i and i+2, then i and i+1.
inline float reduce_add(V x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(V x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

using D = __m256d;
inline D double_zeros() { return _mm256_setzero_pd(); }
inline void add_products(D& first, D& second, V a, V b) {
    first =
        _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_castps256_ps128(b)), first);
    second = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)), _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)),
                             second);
}
inline double total_of(D first, D second) {
    const __m256d four = _mm256_add_pd(first, second);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

struct Fp32 {
    using Element = float;
    static V load(const Element* p) { return avx2::load(p); }
    static V load_n(const Element* p, std::int64_t n) { return _mm256_maskload_ps(p, lanes(n)); }
    static void store(Element* p, V x) { avx2::store(p, x); }
    static void store_n(Element* p, V x, std::int64_t n) { avx2::store_n(p, x, n); }
};

// AVX2 has no masked load or store of 16-bit elements: tails go through a full vector on the stack.
struct Half {
    using Element = std::uint16_t;
    static __m128i load_bits(const Element* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static __m128i load_bits_n(const Element* p, std::int64_t n) {
        Element tail[kLanes] = {};
        for (std::int64_t i = 0; i < n; ++i) tail[i] = p[i];
        return load_bits(tail);
    }
    static void store_bits(Element* p, __m128i bits) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits); }
    static void store_bits_n(Element* p, __m128i bits, std::int64_t n) {
        Element tail[kLanes];
        store_bits(tail, bits);
        for (std::int64_t i = 0; i < n; ++i) p[i] = tail[i];
    }
};

struct Bf16 : Half {
    static V widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
    // Round to nearest even by adding just under half a unit, or just half where the unit's bit is set.
    static __m128i narrow(V x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i upper = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
        const __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i result = _mm256_blendv_epi8(rounded, nan, is_nan);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
        return _mm256_castsi256_si128(packed);
    }
    static V load(const Element* p) { return widen(load_bits(p)); }
    static V load_n(const Element* p, std::int64_t n) { return widen(load_bits_n(p, n)); }
    static void store(Element* p, V x) { store_bits(p, narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { store_bits_n(p, narrow(x), n); }
};

struct Fp16 : Half {
    static V widen(__m128i bits) { return _mm256_cvtph_ps(bits); }
    static __m128i narrow(V x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static V load(const Element* p) { return widen(load_bits(p)); }
    static V load_n(const Element* p, std::int64_t n) { return widen(load_bits_n(p, n)); }
    static void store(Element* p, V x) { store_bits(p, narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { store_bits_n(p, narrow(x), n); }
};

}  // namespace
}  // namespace pytrain::cpu::avx2
