// The vocabulary of generic/*.inl for AVX-512 F, BW, VL and DQ: sixteen lanes, tails by mask. Meanings: scalar/simd.h.
#pragma once
// GCC 12 warns inside its own header: the don't-care operand of unmasked intrinsics reads as an uninitialised variable.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

namespace pytrain::cpu::avx512 {
namespace {

using V = __m512;
constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kMostLanes = kLanes;
constexpr bool kSideBySide = true;

inline __mmask16 lanes(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline V set(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load_n(const float* p, std::int64_t n, float fill) { return _mm512_mask_loadu_ps(set(fill), lanes(n), p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline void store_n(float* p, V x, std::int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
inline V keep_n(V x, std::int64_t n) { return _mm512_maskz_mov_ps(lanes(n), x); }

inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V min(V a, V b) { return _mm512_min_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V square_root(V x) { return _mm512_sqrt_ps(x); }
inline V round_to_integer(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scale_by_power(V x, V n) { return _mm512_scalef_ps(x, n); }

// Halves are folded upon each other: lanes i and i+8, i+4, i+2, i+1. (The compiler's own reduction leaves the order
// open.)
inline float reduce_add(V x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max(V x) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

using D = __m512d;
inline D double_zeros() { return _mm512_setzero_pd(); }
inline void add_products(D& first, D& second, V a, V b) {
    first =
        _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a)), _mm512_cvtps_pd(_mm512_castps512_ps256(b)), first);
    second = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)),
                             _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)), second);
}
inline double total_of(D first, D second) {
    const __m512d eight = _mm512_add_pd(first, second);
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

struct Fp32 {
    using Element = float;
    static V load(const Element* p) { return avx512::load(p); }
    static V load_n(const Element* p, std::int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
    static void store(Element* p, V x) { avx512::store(p, x); }
    static void store_n(Element* p, V x, std::int64_t n) { avx512::store_n(p, x, n); }
};

struct Bf16 {
    using Element = std::uint16_t;
    static V widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
    // Round to nearest even by adding just under half a unit, or just half where the unit's bit is set; a NaN gets its
    // quiet bit instead. The upper half of every lane is what is kept.
    static __m256i narrow(V x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_halves(), rounded));
    }
    static __m512i upper_halves() {  // the odd ones of 32 words, twice
        alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                               23, 25, 27, 29, 31, 1,  3,  5,  7,  9,  11,
                                                               13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
        return _mm512_load_si512(kOdd);
    }
    static V load(const Element* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static V load_n(const Element* p, std::int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
    static void store(Element* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(x)); }
};

struct Fp16 {
    using Element = std::uint16_t;
    static V widen(__m256i bits) { return _mm512_cvtph_ps(bits); }
    static __m256i narrow(V x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static V load(const Element* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static V load_n(const Element* p, std::int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
    static void store(Element* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
    static void store_n(Element* p, V x, std::int64_t n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(x)); }
};

}  // namespace
}  // namespace pytrain::cpu::avx512
