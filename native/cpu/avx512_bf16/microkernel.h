// The register tile of AVX512_BF16: c (14, 32) += a panel (words, 14) * b panel (words, 32), where a word is a pair of
// bf16 and c is fp32.
//
// FLOPs: 4*14*32 per word. One instruction multiplies sixteen pairs and adds both products to sixteen sums, so a step
// has the loads, the registers and the count of instructions of a step of the fp32 tile (avx512/microkernel.h), which
// gives the same shape. Its latency is six cycles: twelve independent accumulators at two a cycle, of 28.
#pragma once
#include <cstdint>

#include "cpu/avx512/microkernel.h"  // and the intrinsics

namespace pytrain::cpu::avx512_bf16 {
namespace {

using avx512::kTileColumns;
using avx512::kTileRows;
using avx512::kTileVectors;

// Cache blocks: deeper than fp32's, since a word takes as long as one of fp32 while c, which is loaded and stored once
// for each block of k, is as large. 512 words: a panel of a (28 KiB) in the first-level cache, and in a second level of
// 1 MiB a task's panels of b (192 x 512: 384 KiB), its block of a (112 x 512: 224 KiB) and its sums (84 KiB).
constexpr std::int64_t kWordDepth = 2;
constexpr int kBlockRows = avx512::kBlockRows;
constexpr int kBlockDepth = kWordDepth * 512;
constexpr int kBlockColumns = 6 * kTileColumns;

inline __m512bh pairs(__m512 words) { return (__m512bh)words; }

template <int kRows>
inline void multiply_tile(std::int64_t words, const float* a, const float* b, float* c, std::int64_t ldc,
                          bool accumulate) {
    __m512 sum[kRows][kTileVectors];
    PYTRAIN_UNROLL
    for (int row = 0; row < kRows; ++row) {
        _mm_prefetch(reinterpret_cast<const char*>(c + row * ldc), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(c + row * ldc + 16), _MM_HINT_T0);
        sum[row][0] = _mm512_setzero_ps();
        sum[row][1] = _mm512_setzero_ps();
    }
    for (std::int64_t p = 0; p < words; ++p) {
        const __m512bh b0 = pairs(_mm512_load_ps(b));
        const __m512bh b1 = pairs(_mm512_load_ps(b + 16));
        PYTRAIN_UNROLL
        for (int row = 0; row < kRows; ++row) {
            const __m512bh factor = pairs(_mm512_set1_ps(a[row]));
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], factor, b0);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], factor, b1);
        }
        a += kRows;
        b += kTileColumns;
    }
    PYTRAIN_UNROLL
    for (int row = 0; row < kRows; ++row) {
        float* out = c + row * ldc;
        if (accumulate) {
            sum[row][0] = _mm512_add_ps(_mm512_loadu_ps(out), sum[row][0]);
            sum[row][1] = _mm512_add_ps(_mm512_loadu_ps(out + 16), sum[row][1]);
        }
        _mm512_storeu_ps(out, sum[row][0]);
        _mm512_storeu_ps(out + 16, sum[row][1]);
    }
}

inline void matmul_tile(std::int64_t words, const float* a, const float* b, float* c, std::int64_t ldc,
                        bool accumulate) {
    multiply_tile<kTileRows>(words, a, b, c, ldc, accumulate);
}

#include "cpu/generic/low_tiles.inl"

// See generic/row_product.inl; a step is a word.
template <int kPanels>
inline void multiply_row(std::int64_t words, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                         float* c, bool accumulate) {
    __m512 sum[kPanels][kTileVectors];
    PYTRAIN_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) sum[panel][0] = sum[panel][1] = _mm512_setzero_ps();
    for (std::int64_t p = 0; p < words; ++p, b += step) {
        const __m512bh factor = pairs(_mm512_set1_ps(a[p]));
        PYTRAIN_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
            const float* const from = b + panel * stride;
            sum[panel][0] = _mm512_dpbf16_ps(sum[panel][0], factor, pairs(_mm512_loadu_ps(from)));
            sum[panel][1] = _mm512_dpbf16_ps(sum[panel][1], factor, pairs(_mm512_loadu_ps(from + 16)));
        }
    }
    PYTRAIN_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
        PYTRAIN_UNROLL
        for (int vector = 0; vector < kTileVectors; ++vector) {
            float* const out = c + panel * kTileColumns + 16 * vector;
            __m512 x = sum[panel][vector];
            if (accumulate) x = _mm512_add_ps(_mm512_loadu_ps(out), x);
            _mm512_storeu_ps(out, x);
        }
    }
}

inline void matmul_row(std::int64_t words, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                       std::int64_t panels, float* c, bool accumulate) {
    for (; panels >= 4; panels -= 4, b += 4 * stride, c += 4 * kTileColumns)
        multiply_row<4>(words, a, b, step, stride, c, accumulate);
    if (panels >= 2) {
        multiply_row<2>(words, a, b, step, stride, c, accumulate);
        panels -= 2, b += 2 * stride, c += 2 * kTileColumns;
    }
    if (panels > 0) multiply_row<1>(words, a, b, step, stride, c, accumulate);
}

// As generic/peak.inl, in dot products of pairs; 24 chains, since these have a longer latency.
inline double peak_flops(std::int64_t repeats, float* sink) {
    constexpr int chains = 24;
    __m512 sum[chains];
    PYTRAIN_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512bh half = pairs(_mm512_castsi512_ps(_mm512_set1_epi16(0x3f00)));
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        PYTRAIN_UNROLL
        for (int i = 0; i < chains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], half, half);
    }
    PYTRAIN_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    _mm512_storeu_ps(sink, sum[0]);
    return 64.0 * chains * static_cast<double>(repeats);
}

}  // namespace
}  // namespace pytrain::cpu::avx512_bf16
