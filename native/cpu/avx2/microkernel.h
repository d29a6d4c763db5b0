// The register tile of AVX2: c (6, 16) += a panel (k, 6) * b panel (k, 16), fp32.
//
// FLOPs: 2*6*16*k. Loads per step of k: 2 vectors of b and 6 broadcasts of a for 12 fused multiply-adds.
// The multiply-adds bind: two per cycle with a latency of four (Zen, Intel since Skylake) or five (Haswell) want 8 to
// 10 independent accumulators; 16 registers hold 12, 2 vectors of b and 2 for the broadcasts of a, which are each used
// twice. 8 loads pass in 4 of the 6 cycles of a step.
#pragma once
#include <cstdint>

#include "cpu/avx2/simd.h"  // and the intrinsics
#include "cpu/generic/unroll.h"

namespace pytrain::cpu::avx2 {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = 8 * kTileVectors;

// Cache blocks. A panel of a, 6 x 256 floats (6 KiB), stays in a first-level cache of 32 KiB while panels of b (16 KiB
// each) stream past it from the second level: 64 bytes per step of 6 cycles. A task's block of a (72 x 256: 72 KiB) and
// its panels of b (128 x 256: 128 KiB) share a second level of 256 KiB, the smallest that AVX2 was built with, with its
// block of c (36 KiB). 256 steps make loading and storing c, and one call, 2 % of a tile's time.
constexpr int kBlockRows = 12 * kTileRows;
constexpr int kBlockDepth = 256;
constexpr int kBlockColumns = 8 * kTileColumns;

template <int kRows>
inline void multiply_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    __m256 sum[kRows][kTileVectors];
    PYTRAIN_UNROLL
    for (int row = 0; row < kRows; ++row) {
        // c is not needed before the end of the loop over k: ask for it now.
        _mm_prefetch(reinterpret_cast<const char*>(c + row * ldc), _MM_HINT_T0);
        sum[row][0] = _mm256_setzero_ps();
        sum[row][1] = _mm256_setzero_ps();
    }
    for (std::int64_t p = 0; p < k; ++p) {
        const __m256 b0 = _mm256_load_ps(b);
        const __m256 b1 = _mm256_load_ps(b + 8);
        PYTRAIN_UNROLL
        for (int row = 0; row < kRows; ++row) {
            const __m256 factor = _mm256_broadcast_ss(a + row);
            sum[row][0] = _mm256_fmadd_ps(factor, b0, sum[row][0]);
            sum[row][1] = _mm256_fmadd_ps(factor, b1, sum[row][1]);
        }
        a += kRows;
        b += kTileColumns;
    }
    PYTRAIN_UNROLL
    for (int row = 0; row < kRows; ++row) {
        float* out = c + row * ldc;
        if (accumulate) {
            sum[row][0] = _mm256_add_ps(_mm256_loadu_ps(out), sum[row][0]);
            sum[row][1] = _mm256_add_ps(_mm256_loadu_ps(out + 8), sum[row][1]);
        }
        _mm256_storeu_ps(out, sum[row][0]);
        _mm256_storeu_ps(out + 8, sum[row][1]);
    }
}

inline void matmul_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    multiply_tile<kTileRows>(k, a, b, c, ldc, accumulate);
}

#include "cpu/generic/low_tiles.inl"

// block[i] lane j becomes block[j] lane i: pairs of lanes, pairs of pairs, then halves of the vector.
inline void transpose(__m256 (&block)[8]) {
    __m256 pairs[8];
    PYTRAIN_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(block[i], block[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(block[i], block[i + 1]);
    }
    // quads[4*g + c]: lane q of half t holds vector 4*g + q, position 4*t + c
    __m256 quads[8];
    PYTRAIN_UNROLL
    for (int i = 0; i < 8; i += 4) {
        quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    PYTRAIN_UNROLL
    for (int c = 0; c < 4; ++c) {
        block[c] = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x20);
        block[c + 4] = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x31);
    }
}

}  // namespace
}  // namespace pytrain::cpu::avx2
