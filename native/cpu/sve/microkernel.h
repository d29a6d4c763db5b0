// The register tile of SVE: c (12, 2 vectors) += a panel (k, 12) * b panel (k, 2 vectors), fp32. README.md walks
// through it.
//
// FLOPs: 2 * 12 * 2 * lanes * k. Loads per step of k: 2 vectors of b and 12 broadcasts of a for 24 fused multiply-adds.
// The multiply-adds bind: two per cycle with a latency of nine (A64FX) want at least 18 independent accumulators. 32
// registers hold 24, 2 vectors of b and 6 broadcasts on their way. 14 loads pass two load ports in 7 of the 12 cycles
// of a step, and its 24 + 14 instructions four decoders in 10.
//
// Why 12 x 2 and not 8 x 3 vectors, which loads less (11): two vectors are 32 columns at 512 bits, so head sizes of 64
// and 128 and the slices of a tensor-parallel product (896, 672, 224 columns) are whole tiles, while 48 columns waste a
// tenth of attention and a fourteenth of those products; and the loads are not what binds.
#pragma once
#include <cstdint>

#include "cpu/sve/simd.h"  // and the intrinsics

namespace pytrain::cpu::sve {
namespace {

constexpr int kTileRows = 12;
constexpr int kTileVectors = 2;

// Cache blocks where the machine does not say how large its caches are; select.cpp fits them where it does.
constexpr int kBlockRows = 7 * kTileRows;
constexpr int kBlockDepth = 256;
constexpr int kBlockTiles = 5;  // of columns

// An SVE vector cannot be an element of an array: every accumulator has a name, and what is done with each row is
// written by a macro of the row's number.
#define PYTRAIN_EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

// A product of no steps.
__attribute__((noinline)) void clear_tile(float* c, std::int64_t ldc, bool accumulate) {
    if (accumulate) return;
    for (int row = 0; row < kTileRows; ++row) {
        store(c + row * ldc, set(0.0f));
        svst1_vnum_f32(all(), c + row * ldc, 1, set(0.0f));
    }
}

void matmul_tile(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) {
    if (k <= 0) {
        clear_tile(c, ldc, accumulate);
        return;
    }
    const std::int64_t stride = kTileVectors * kLanes;
    // c is not needed before the end of the loop over k: ask for it now. The first products take the place of zeros.
    const V first_left = load(b), first_right = svld1_vnum_f32(all(), b, 1);
#define PYTRAIN_BEGIN(row)                     \
    __builtin_prefetch(c + (row) * ldc);       \
    const V first##row = set(a[row]);          \
    V left##row = mul(first##row, first_left); \
    V right##row = mul(first##row, first_right);
    PYTRAIN_EACH_ROW(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
    a += kTileRows;
    b += stride;
    const auto step = [&](const float* factors, const float* vectors) {
        const V b_left = load(vectors), b_right = svld1_vnum_f32(all(), vectors, 1);
#define PYTRAIN_MULTIPLY(row)                                         \
    {                                                                 \
        const V factor = set(factors[row]);                           \
        left##row = svmla_f32_m(all(), left##row, factor, b_left);    \
        right##row = svmla_f32_m(all(), right##row, factor, b_right); \
    }
        PYTRAIN_EACH_ROW(PYTRAIN_MULTIPLY)
#undef PYTRAIN_MULTIPLY
    };
    // The merging form is FMLA: given the choice, GCC takes FMAD for some, which overwrites a factor, and a move with
    // it. Two steps a round: a step alone has four instructions around it, which decoders of four would feel.
    std::int64_t p = 1;
    if (__builtin_expect(k % 2 == 0, 1)) {
        step(a, b);
        a += kTileRows;
        b += stride;
        ++p;
    }
    for (; p < k; p += 2) {
        step(a, b);
        step(a + kTileRows, b + stride);
        a += 2 * kTileRows;
        b += 2 * stride;
    }
#define PYTRAIN_ADD(row)                               \
    left##row = add(load(c + (row) * ldc), left##row); \
    right##row = add(svld1_vnum_f32(all(), c + (row) * ldc, 1), right##row);
    if (accumulate) {
        PYTRAIN_EACH_ROW(PYTRAIN_ADD)
    }
#undef PYTRAIN_ADD
#define PYTRAIN_STORE(row)             \
    store(c + (row) * ldc, left##row); \
    svst1_vnum_f32(all(), c + (row) * ldc, 1, right##row);
    PYTRAIN_EACH_ROW(PYTRAIN_STORE)
#undef PYTRAIN_STORE
}

// See generic/row_product.inl. Four panels at a time are eight chains. As in the tile, the first products take the
// place of zeros, so k is at least 1.
#define PYTRAIN_EACH_PANEL(DO) DO(0) DO(1) DO(2) DO(3)
void multiply_four_panels(std::int64_t k, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                          float* c, bool accumulate) {
    const std::int64_t width = kTileVectors * kLanes;
    const V first = set(a[0]);
#define PYTRAIN_BEGIN(panel)                                \
    V left##panel = mul(first, load(b + (panel) * stride)); \
    V right##panel = mul(first, svld1_vnum_f32(all(), b + (panel) * stride, 1));
    PYTRAIN_EACH_PANEL(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
    for (std::int64_t p = 1; p < k; ++p) {
        b += step;
        const V factor = set(a[p]);
#define PYTRAIN_MULTIPLY(panel)                                                        \
    left##panel = svmla_f32_m(all(), left##panel, factor, load(b + (panel) * stride)); \
    right##panel = svmla_f32_m(all(), right##panel, factor, svld1_vnum_f32(all(), b + (panel) * stride, 1));
        PYTRAIN_EACH_PANEL(PYTRAIN_MULTIPLY)
#undef PYTRAIN_MULTIPLY
    }
#define PYTRAIN_STORE(panel)                                                                                         \
    {                                                                                                                \
        float* const out = c + (panel) * width;                                                                      \
        store(out, accumulate ? add(load(out), left##panel) : left##panel);                                          \
        svst1_vnum_f32(all(), out, 1, accumulate ? add(svld1_vnum_f32(all(), out, 1), right##panel) : right##panel); \
    }
    PYTRAIN_EACH_PANEL(PYTRAIN_STORE)
#undef PYTRAIN_STORE
}
#undef PYTRAIN_EACH_PANEL

void multiply_vector(std::int64_t k, const float* a, const float* b, std::int64_t step, float* c, bool accumulate) {
    V sum = mul(set(a[0]), load(b));
    for (std::int64_t p = 1; p < k; ++p) sum = svmla_f32_m(all(), sum, set(a[p]), load(b + p * step));
    store(c, accumulate ? add(load(c), sum) : sum);
}

void matmul_row(std::int64_t k, const float* a, const float* b, std::int64_t step, std::int64_t stride,
                std::int64_t panels, float* c, bool accumulate) {
    const std::int64_t width = kTileVectors * kLanes;
    if (k <= 0) {
        for (std::int64_t i = 0; i < panels * width && !accumulate; ++i) c[i] = 0.0f;
        return;
    }
    for (; panels >= 4; panels -= 4, b += 4 * stride, c += 4 * width)
        multiply_four_panels(k, a, b, step, stride, c, accumulate);
    for (; panels > 0; --panels, b += stride, c += width)
        for (std::int64_t vector = 0; vector < kTileVectors; ++vector)
            multiply_vector(k, a, b + vector * kLanes, step, c + vector * kLanes, accumulate);
}

// See generic/peak.inl: as many chains as the tile has accumulators.
double peak_flops(std::int64_t repeats, float* sink) {
    const V factor = set(1e-9f);
#define PYTRAIN_BEGIN(row) V left##row = set(row), right##row = set(row + 0.5f);
    PYTRAIN_EACH_ROW(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
#define PYTRAIN_MULTIPLY(row)                      \
    left##row = fma(left##row, factor, left##row); \
    right##row = fma(right##row, factor, right##row);
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        PYTRAIN_EACH_ROW(PYTRAIN_MULTIPLY)
    }
#undef PYTRAIN_MULTIPLY
    V sum = set(0.0f);
#define PYTRAIN_SUM(row) sum = add(sum, add(left##row, right##row));
    PYTRAIN_EACH_ROW(PYTRAIN_SUM)
#undef PYTRAIN_SUM
    store(sink, sum);
    return 2.0 * kTileRows * kTileVectors * static_cast<double>(kLanes) * static_cast<double>(repeats);
}

}  // namespace
}  // namespace pytrain::cpu::sve
