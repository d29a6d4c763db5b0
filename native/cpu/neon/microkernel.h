// The register tile of NEON: c (8, 12) += a panel (k, 8) * b panel (k, 12), fp32.
//
// FLOPs: 2*8*12*k. Loads per step of k: 3 vectors of b and 2 of a, whose lanes the multiply-adds name directly, for 24
// fused multiply-adds. The multiply-adds bind: two per cycle with a latency of four (Neoverse N1, Cortex-A76) want 8
// independent accumulators, four per cycle (Neoverse V1, V2) 16. 32 registers hold 24, 3 vectors of b and 2 of a.
#pragma once
#include <cstdint>

#include "cpu/generic/unroll.h"
#include "cpu/neon/simd.h"  // and the intrinsics

namespace pytrain::cpu::neon {
namespace {

constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;
constexpr int kTileColumns = 4 * kTileVectors;

// Cache blocks where the machine does not say how large its caches are; select.cpp fits them where it does. A panel of
// a, 8 x 256 floats (8 KiB), stays in a first-level cache of 32 KiB while panels of b (12 KiB each) stream past it. A
// task's block of a (96 x 256: 96 KiB) and its panels of b (96 x 256: 96 KiB) fit the second level of 256 KiB of the
// smallest such cores, with its block of c (36 KiB).
constexpr int kBlockRows = 12 * kTileRows;
constexpr int kBlockDepth = 256;
constexpr int kBlockColumns = 8 * kTileColumns;

template <int lane>
inline void multiply_row(V (&sum)[kTileVectors], V a, const V (&b)[kTileVectors]) {
    PYTRAIN_UNROLL
    for (int vector = 0; vector < kTileVectors; ++vector)
        sum[vector] = vfmaq_laneq_f32(sum[vector], b[vector], a, lane);
}

inline void matmul_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    V sum[kTileRows][kTileVectors];
    PYTRAIN_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
        __builtin_prefetch(c + row * ldc);  // c is not needed before the end of the loop over k: ask for it now
        PYTRAIN_UNROLL
        for (int vector = 0; vector < kTileVectors; ++vector) sum[row][vector] = set(0.0f);
    }
    for (std::int64_t p = 0; p < k; ++p) {
        const V factors[kTileVectors] = {load(b), load(b + 4), load(b + 8)};
        const V upper = load(a);
        const V lower = load(a + 4);
        multiply_row<0>(sum[0], upper, factors);
        multiply_row<1>(sum[1], upper, factors);
        multiply_row<2>(sum[2], upper, factors);
        multiply_row<3>(sum[3], upper, factors);
        multiply_row<0>(sum[4], lower, factors);
        multiply_row<1>(sum[5], lower, factors);
        multiply_row<2>(sum[6], lower, factors);
        multiply_row<3>(sum[7], lower, factors);
        a += kTileRows;
        b += kTileColumns;
    }
    PYTRAIN_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
        PYTRAIN_UNROLL
        for (int vector = 0; vector < kTileVectors; ++vector) {
            float* const out = c + row * ldc + 4 * vector;
            store(out, accumulate ? add(load(out), sum[row][vector]) : sum[row][vector]);
        }
    }
}

// block[i] lane j becomes block[j] lane i: pairs of lanes, then halves of the vector.
inline void transpose(V (&block)[4]) {
    const float64x2_t even01 = vreinterpretq_f64_f32(vtrn1q_f32(block[0], block[1]));
    const float64x2_t odd01 = vreinterpretq_f64_f32(vtrn2q_f32(block[0], block[1]));
    const float64x2_t even23 = vreinterpretq_f64_f32(vtrn1q_f32(block[2], block[3]));
    const float64x2_t odd23 = vreinterpretq_f64_f32(vtrn2q_f32(block[2], block[3]));
    block[0] = vreinterpretq_f32_f64(vtrn1q_f64(even01, even23));
    block[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd01, odd23));
    block[2] = vreinterpretq_f32_f64(vtrn2q_f64(even01, even23));
    block[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd01, odd23));
}

}  // namespace
}  // namespace pytrain::cpu::neon
