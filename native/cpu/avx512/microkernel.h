// The register tile of AVX-512: c (14, 32) += a panel (k, 14) * b panel (k, 32), fp32.
//
// FLOPs: 2*14*32*k. Loads per step of k: 2 vectors of b and 14 broadcasts of a for 28 fused multiply-adds.
// The multiply-adds bind: two per cycle with a latency of four want at least 8 independent accumulators, and the two
// load ports want more multiply-adds than loads, hence as tall a tile as 32 registers hold: 28 accumulators, 2 vectors
// of b, and 2 for the broadcasts of a, which are each used twice. 16 loads pass in 8 of the 14 cycles of a step. A core
// with one 512-bit unit (Zen 4) takes 28 cycles a step and has even more room for loads.
#pragma once
#include <cstdint>

#include "cpu/avx512/simd.h"  // and the intrinsics
#include "cpu/generic/unroll.h"

namespace pytrain::cpu::avx512 {
namespace {

constexpr int kTileRows = 14;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = 16 * kTileVectors;

// Cache blocks. A panel of a, 14 x 512 floats (28 KiB), stays in a first-level cache of 32 or 48 KiB while panels of b
// (64 KiB each) stream past it from the second level: 128 bytes per step of 14 or more cycles, which is a sixth of what
// that level gives. A task's block of a (112 x 512: 224 KiB) and its panels of b (192 x 512: 384 KiB) share a second
// level of 1 MiB with its block of c (84 KiB). 512 steps make loading and storing c, and one call, 1.5 % of a tile's
// time; 384, with columns of 256, were 1 % slower on two threads.
constexpr int kBlockRows = 8 * kTileRows;
constexpr int kBlockDepth = 512;
constexpr int kBlockColumns = 6 * kTileColumns;

template <int kRows>
inline void multiply_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    __m512 sum[kRows][kTileVectors];
    PYTRAIN_UNROLL
    for (int row = 0; row < kRows; ++row) {
        // c is not needed before the end of the loop over k: ask for it now.
        _mm_prefetch(reinterpret_cast<const char*>(c + row * ldc), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(c + row * ldc + 16), _MM_HINT_T0);
        sum[row][0] = _mm512_setzero_ps();
        sum[row][1] = _mm512_setzero_ps();
    }
    for (std::int64_t p = 0; p < k; ++p) {
        const __m512 b0 = _mm512_load_ps(b);
        const __m512 b1 = _mm512_load_ps(b + 16);
        PYTRAIN_UNROLL
        for (int row = 0; row < kRows; ++row) {
            const __m512 factor = _mm512_set1_ps(a[row]);
            sum[row][0] = _mm512_fmadd_ps(factor, b0, sum[row][0]);
            sum[row][1] = _mm512_fmadd_ps(factor, b1, sum[row][1]);
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

inline void matmul_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    multiply_tile<kTileRows>(k, a, b, c, ldc, accumulate);
}

#include "cpu/generic/low_tiles.inl"

// block[i] lane j becomes block[j] lane i: pairs of lanes, pairs of pairs, then quarters of the vector twice.
inline void transpose(__m512 (&block)[16]) {
    __m512 pairs[16];
    PYTRAIN_UNROLL
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(block[i], block[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(block[i], block[i + 1]);
    }
    // quads[4*g + c]: lane q of quarter t holds vector 4*g + q, position 4*t + c
    __m512 quads[16];
    PYTRAIN_UNROLL
    for (int i = 0; i < 16; i += 4) {
        quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    PYTRAIN_UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m512 low_even = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0x88);
        const __m512 low_odd = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0xdd);
        const __m512 high_even = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0x88);
        const __m512 high_odd = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0xdd);
        block[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
        block[c + 8] = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
        block[c + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
        block[c + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
}

}  // namespace
}  // namespace pytrain::cpu::avx512
