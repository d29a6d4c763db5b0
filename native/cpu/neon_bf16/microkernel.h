// The register tile of NEON with bf16: c (12, 8) += a panel * b panel, where a step of a panel has four bf16 of each of
// its vectors, neighbours in k, and c is fp32.
//
// FLOPs: 2*4*12*8 per step. BFMMLA multiplies two rows of four by two columns of four and adds the four sums to a 2 x 2
// block: sixteen multiply-adds where FMLA does four. So 24 sums are six pairs of rows by four pairs of columns, and a
// step loads 6 vectors of a and 4 of b. 12 x 8, where fp32 has 8 x 12: with BFMMLA both load as much, and the vectors
// of b, which stay through a step, are the fewer: 32 registers hold 24 sums, 4 of b and 4 of a on their way.
#pragma once
#include <cstdint>

#include "cpu/generic/unroll.h"
#include "cpu/neon/simd.h"  // and the intrinsics

namespace pytrain::cpu::neon_bf16 {
namespace {

using neon::V;

constexpr int kPairs = 6;  // of rows
constexpr int kVectors = 4;
constexpr int kTileRows = 2 * kPairs;
constexpr int kTileColumns = 2 * kVectors;
constexpr std::int64_t kWordDepth = 2, kStepWords = 2;

// Cache blocks where the machine does not say how large its caches are: fp32's (neon/microkernel.h), as many words
// deep.
constexpr int kBlockRows = 8 * kTileRows;
constexpr int kBlockDepth = kWordDepth * 256;
constexpr int kBlockColumns = 12 * kTileColumns;

inline bfloat16x8_t load_steps(const float* words) { return vreinterpretq_bf16_f32(vld1q_f32(words)); }

inline V first_rows(V left, V right) {
    return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(left), vreinterpretq_f64_f32(right)));
}
inline V second_rows(V left, V right) {
    return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(left), vreinterpretq_f64_f32(right)));
}

inline void put(float* out, V x, bool accumulate) { neon::store(out, accumulate ? neon::add(neon::load(out), x) : x); }

// GCC 12 would load all of a first, and have too few registers for the sums.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-schedule-insns")))
#endif
inline void matmul_tile(std::int64_t words, const float* a, const float* b, float* c, std::int64_t ldc,
                        bool accumulate) {
    V sum[kPairs][kVectors];
    PYTRAIN_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
        __builtin_prefetch(c + 2 * pair * ldc);  // c is not needed before the end of the loop over k: ask for it now
        __builtin_prefetch(c + (2 * pair + 1) * ldc);
        PYTRAIN_UNROLL
        for (int vector = 0; vector < kVectors; ++vector) sum[pair][vector] = neon::set(0.0f);
    }
    for (std::int64_t word = 0; word < words; word += kStepWords) {
        const bfloat16x8_t columns[kVectors] = {load_steps(b), load_steps(b + 4), load_steps(b + 8),
                                                load_steps(b + 12)};
        PYTRAIN_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
            const bfloat16x8_t rows = load_steps(a + 4 * pair);
            PYTRAIN_UNROLL
            for (int vector = 0; vector < kVectors; ++vector)
                sum[pair][vector] = vbfmmlaq_f32(sum[pair][vector], rows, columns[vector]);
        }
        a += kStepWords * kTileRows;
        b += kStepWords * kTileColumns;
    }
    PYTRAIN_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
        PYTRAIN_UNROLL
        for (int half = 0; half < 2; ++half) {
            const V left = sum[pair][2 * half], right = sum[pair][2 * half + 1];
            float* const out = c + 2 * pair * ldc + 4 * half;
            put(out, first_rows(left, right), accumulate);
            put(out + ldc, second_rows(left, right), accumulate);
        }
    }
}

// As generic/peak.inl, in matrix products; as many chains as the tile has sums.
inline double peak_flops(std::int64_t repeats, float* sink) {
    constexpr int chains = kPairs * kVectors;
    V sum[chains];
    PYTRAIN_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] = neon::set(sink[0] + static_cast<float>(i));
    // Just over a half: GCC 12 writes one half itself as an immediate that only cores with fp16 arithmetic have.
    const bfloat16x8_t half = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f01));
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        PYTRAIN_UNROLL
        for (int i = 0; i < chains; ++i) sum[i] = vbfmmlaq_f32(sum[i], half, half);
    }
    PYTRAIN_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] = neon::add(sum[0], sum[i]);
    neon::store(sink, sum[0]);
    return 32.0 * chains * static_cast<double>(repeats);
}

}  // namespace
}  // namespace pytrain::cpu::neon_bf16
