// The register tile of SVE with bf16: c (12, 2 vectors) += a panel * b panel, where a step of a panel has four bf16 of
// each of its vectors, neighbours in k, and c is fp32. sve/README.md walks through it.
//
// FLOPs: 2*4*12*2*lanes per step. BFMMLA multiplies, in each 128 bits, two rows of four by two columns of four and adds
// the four sums to a 2 x 2 block: sixteen multiply-adds where FMLA does four. So a sum holds two rows of half a vector
// of columns, six pairs of rows and four such halves are 24 sums, and a step loads 4 vectors of b and 6 pairs of rows
// of a, each repeated in every 128 bits (LD1RQ). 32 registers hold 24 sums, 4 vectors of b and 4 pairs on their way.
#pragma once
#include <cstdint>

#include "cpu/sve/simd.h"  // and the intrinsics

namespace pytrain::cpu::sve_bf16 {
namespace {

using sve::kLanes;
using sve::V;

constexpr int kTileRows = 12;
constexpr int kTileVectors = 2;
constexpr std::int64_t kWordDepth = 2, kStepWords = 2;

// Cache blocks where the machine does not say how large its caches are: fp32's (sve/microkernel.h), as many words deep.
constexpr int kBlockRows = 7 * kTileRows;
constexpr std::int64_t kBlockDepth = kWordDepth * 256;
constexpr int kBlockTiles = 5;  // of columns

using H = svbfloat16_t;

inline H load_halves(const float* words, std::int64_t vector) {
    return svld1_vnum_bf16(svptrue_b16(), reinterpret_cast<const bfloat16_t*>(words), vector);
}
inline H repeat_pair(const float* words) {
    return svld1rq_bf16(svptrue_b16(), reinterpret_cast<const bfloat16_t*>(words));
}
// The first and the second rows of two neighbouring vectors of 2 x 2 blocks: the blocks' rows are of 64 bits.
inline V first_rows(V left, V right) {
    return svreinterpret_f32_f64(svuzp1_f64(svreinterpret_f64_f32(left), svreinterpret_f64_f32(right)));
}
inline V second_rows(V left, V right) {
    return svreinterpret_f32_f64(svuzp2_f64(svreinterpret_f64_f32(left), svreinterpret_f64_f32(right)));
}

// An SVE vector cannot be an element of an array: see sve/microkernel.h.
#define PYTRAIN_EACH_PAIR(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

void matmul_tile(std::int64_t words, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    const std::int64_t stride = kStepWords * kTileVectors * kLanes;
#define PYTRAIN_BEGIN(pair)                                                                    \
    __builtin_prefetch(c + 2 * (pair) * ldc);                                                  \
    __builtin_prefetch(c + (2 * (pair) + 1) * ldc);                                            \
    V sum##pair##0 = sve::set(0.0f), sum##pair##1 = sum##pair##0, sum##pair##2 = sum##pair##0, \
      sum##pair##3 = sum##pair##0;
    PYTRAIN_EACH_PAIR(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
    for (std::int64_t word = 0; word < words; word += kStepWords) {
        const H b0 = load_halves(b, 0), b1 = load_halves(b, 1), b2 = load_halves(b, 2), b3 = load_halves(b, 3);
#define PYTRAIN_MULTIPLY(pair)                                   \
    {                                                            \
        const H rows = repeat_pair(a + 2 * kStepWords * (pair)); \
        sum##pair##0 = svbfmmla_f32(sum##pair##0, rows, b0);     \
        sum##pair##1 = svbfmmla_f32(sum##pair##1, rows, b1);     \
        sum##pair##2 = svbfmmla_f32(sum##pair##2, rows, b2);     \
        sum##pair##3 = svbfmmla_f32(sum##pair##3, rows, b3);     \
    }
        PYTRAIN_EACH_PAIR(PYTRAIN_MULTIPLY)
#undef PYTRAIN_MULTIPLY
        a += kStepWords * kTileRows;
        b += stride;
    }
    const svbool_t all = sve::all();
#define PYTRAIN_STORE(row, rows_of, pair)                                                          \
    {                                                                                              \
        float* const out = c + (row) * ldc;                                                        \
        V left = rows_of(sum##pair##0, sum##pair##1), right = rows_of(sum##pair##2, sum##pair##3); \
        if (accumulate) {                                                                          \
            left = sve::add(sve::load(out), left);                                                 \
            right = sve::add(svld1_vnum_f32(all, out, 1), right);                                  \
        }                                                                                          \
        sve::store(out, left);                                                                     \
        svst1_vnum_f32(all, out, 1, right);                                                        \
    }
#define PYTRAIN_STORE_PAIR(pair)                \
    PYTRAIN_STORE(2 * (pair), first_rows, pair) \
    PYTRAIN_STORE(2 * (pair) + 1, second_rows, pair)
    PYTRAIN_EACH_PAIR(PYTRAIN_STORE_PAIR)
#undef PYTRAIN_STORE_PAIR
#undef PYTRAIN_STORE
}

// See generic/peak.inl: as many chains as the tile has accumulators.
double peak_flops(std::int64_t repeats, float* sink) {
    // Just over a half: GCC 12 writes one half itself as an immediate that only cores with fp16 arithmetic have.
    const H half = svreinterpret_bf16_u16(svdup_n_u16(0x3f01));
#define PYTRAIN_BEGIN(pair)                                                         \
    V sum##pair##0 = sve::set(4 * (pair)), sum##pair##1 = sve::set(4 * (pair) + 1), \
      sum##pair##2 = sve::set(4 * (pair) + 2), sum##pair##3 = sve::set(4 * (pair) + 3);
    PYTRAIN_EACH_PAIR(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
#define PYTRAIN_MULTIPLY(pair)                             \
    sum##pair##0 = svbfmmla_f32(sum##pair##0, half, half); \
    sum##pair##1 = svbfmmla_f32(sum##pair##1, half, half); \
    sum##pair##2 = svbfmmla_f32(sum##pair##2, half, half); \
    sum##pair##3 = svbfmmla_f32(sum##pair##3, half, half);
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        PYTRAIN_EACH_PAIR(PYTRAIN_MULTIPLY)
    }
#undef PYTRAIN_MULTIPLY
    V sum = sve::set(0.0f);
#define PYTRAIN_SUM(pair) \
    sum = sve::add(sum, sve::add(sve::add(sum##pair##0, sum##pair##1), sve::add(sum##pair##2, sum##pair##3)));
    PYTRAIN_EACH_PAIR(PYTRAIN_SUM)
#undef PYTRAIN_SUM
    sve::store(sink, sum);
    return 8.0 * kTileRows * kTileVectors * static_cast<double>(kLanes) * static_cast<double>(repeats);
}

}  // namespace
}  // namespace pytrain::cpu::sve_bf16
