// Products of two fp16 operands in fp16 multiply-adds, for cores like the A64FX that have no others of 16 bits: twice
// the rate of fp32, in chains of at most kChain, each flushed into fp32. README.md has the error by length of chain.
//
// A word is a pair of fp16 that are neighbours in k, as in the panels of bf16 pairs: the even halves of an accumulator
// sum the even elements of k, the odd halves the odd ones, both for the same column. So the tile has the shape of the
// fp32 tile, and a flush adds two halves to one vector of c: load, shift, 2 conversions, 2 additions, store.
#pragma once
#include <cstdint>

#include "cpu/sve/microkernel.h"
#include "cpu/sve/pack.h"

namespace pytrain::cpu::sve {
namespace {

constexpr std::int64_t kPair = 2;    // elements of k in a word
constexpr std::int64_t kChain = 64;  // multiply-adds from one flush to the next

// --- packing: only fp16 sources, since products of other types do not come here -------------------------------

// Words of `n` elements from p on; what is beyond is zero.
inline V load_pairs(const std::uint16_t* p, std::int64_t n) {
    return svreinterpret_f32_u16(svld1_u16(svwhilelt_b16_s64(0, n), p));
}

void pack_pairs_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                      std::int64_t panel_width) {
    const auto* elements = static_cast<const std::uint16_t*>(source);
    const std::int64_t words = (k + 1) / kPair;
    for (std::int64_t first = 0; first < panel_width; first += 4) {
        const auto* vectors = elements + first * ld;
        const std::int64_t valid = width - first, n = panel_width - first < 4 ? panel_width - first : 4;
        for (std::int64_t word = 0; word < words; word += kLanes) {
            const auto* begin = vectors + kPair * word;
            const std::int64_t rest = k - kPair * word, steps = words - word < kLanes ? words - word : kLanes;
            store_columns(panel + word * panel_width + first, panel_width, steps, n,
                          load_pairs(begin, valid > 0 ? rest : 0), load_pairs(begin + ld, valid > 1 ? rest : 0),
                          load_pairs(begin + 2 * ld, valid > 2 ? rest : 0),
                          load_pairs(begin + 3 * ld, valid > 3 ? rest : 0));
        }
    }
}

void pack_pairs_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                       std::int64_t panel_width) {
    const auto* elements = static_cast<const std::uint16_t*>(source);
    const std::int64_t words = (k + 1) / kPair;
    for (std::int64_t first = 0; first < panel_width; first += kLanes) {
        const svbool_t valid = lanes(width - first), room = lanes(panel_width - first);
        for (std::int64_t word = 0; word < words; ++word) {
            const auto* lower = elements + kPair * word * ld + first;
            const svbool_t second = kPair * word + 1 < k ? valid : svpfalse_b();
            const svuint32_t high = svlsl_n_u32_x(all(), svld1uh_u32(second, lower + ld), 16);
            const svuint32_t pairs = svorr_u32_x(all(), svld1uh_u32(valid, lower), high);
            svst1_f32(room, panel + word * panel_width + first, svreinterpret_f32_u32(pairs));
        }
    }
}

// --- the tile -----------------------------------------------------------------------------------------------

using H = svfloat16_t;

inline H halves(V words) { return svreinterpret_f16_f32(words); }
// Both halves of each word, widened and added: elements of c.
inline V sum_of_halves(H pairs) {
    const svuint32_t odd = svlsr_n_u32_x(all(), svreinterpret_u32_f16(pairs), 16);
    return add(svcvt_f32_f16_x(all(), pairs), svcvt_f32_f16_x(all(), svreinterpret_f16_u32(odd)));
}

// GCC 12 would move loads of the next step so far ahead that sums no longer fit the registers, in the inner loop.
#if defined(__GNUC__) && !defined(__clang__)
#define PYTRAIN_KEEP_ORDER __attribute__((optimize("no-schedule-insns")))
#else
#define PYTRAIN_KEEP_ORDER
#endif

// FLOPs: 2 * 12 * 2 * lanes * 2 a word. The multiply-adds bind: 12 cycles a word on the A64FX, as for fp32, and a flush
// has 120 operations on the same two pipes beside 24 * kChain of them: 7 % at a chain of 64.
PYTRAIN_KEEP_ORDER void matmul_tile_chains(std::int64_t words, const float* a, const float* b, float* c,
                                           std::int64_t ldc, bool accumulate) {
    if (words <= 0) {
        matmul_tile(0, a, b, c, ldc, accumulate);
        return;
    }
    const svbool_t pairs = svptrue_b16();
    const std::int64_t stride = kTileVectors * kLanes;
    do {
        const std::int64_t chain = words < kChain ? words : kChain;
        // The first products take the place of zeros.
        const H first_left = halves(load(b)), first_right = halves(svld1_vnum_f32(all(), b, 1));
#define PYTRAIN_BEGIN(row)                                    \
    const H first##row = halves(set(a[row]));                 \
    H left##row = svmul_f16_x(pairs, first##row, first_left); \
    H right##row = svmul_f16_x(pairs, first##row, first_right);
        PYTRAIN_EACH_ROW(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
        a += kTileRows;
        b += stride;
        const auto step = [&](const float* factors, const float* vectors) {
            const H b_left = halves(load(vectors)), b_right = halves(svld1_vnum_f32(all(), vectors, 1));
#define PYTRAIN_MULTIPLY(row)                                         \
    {                                                                 \
        const H factor = halves(set(factors[row]));                   \
        left##row = svmla_f16_m(pairs, left##row, factor, b_left);    \
        right##row = svmla_f16_m(pairs, right##row, factor, b_right); \
    }
            PYTRAIN_EACH_ROW(PYTRAIN_MULTIPLY)
#undef PYTRAIN_MULTIPLY
        };
        std::int64_t word = 1;
        if (__builtin_expect(chain % 2 == 0, 1)) {
            step(a, b);
            a += kTileRows;
            b += stride;
            ++word;
        }
        for (; word < chain; word += 2) {
            step(a, b);
            step(a + kTileRows, b + stride);
            a += 2 * kTileRows;
            b += 2 * stride;
        }
#define PYTRAIN_FLUSH(row)                                                          \
    {                                                                               \
        float* const out = c + (row) * ldc;                                         \
        const V left = sum_of_halves(left##row), right = sum_of_halves(right##row); \
        store(out, add(svld1_f32(before, out), left));                              \
        svst1_vnum_f32(all(), out, 1, add(svld1_vnum_f32(before, out, 1), right));  \
    }
        // Zeros are added where c is to be overwritten: one path for both.
        const svbool_t before = accumulate ? all() : svpfalse_b();
        PYTRAIN_EACH_ROW(PYTRAIN_FLUSH)
#undef PYTRAIN_FLUSH
        accumulate = true;
        words -= chain;
    } while (words > 0);
}

#undef PYTRAIN_KEEP_ORDER

// See generic/peak.inl.
double peak_flops_chains(std::int64_t repeats, float* sink) {
    const svbool_t pairs = svptrue_b16();
    const H factor = svdup_n_f16(static_cast<float16_t>(1e-3f));
#define PYTRAIN_BEGIN(row)                                  \
    H left##row = svdup_n_f16(static_cast<float16_t>(row)), \
      right##row = svdup_n_f16(static_cast<float16_t>(row + 0.5f));
    PYTRAIN_EACH_ROW(PYTRAIN_BEGIN)
#undef PYTRAIN_BEGIN
#define PYTRAIN_MULTIPLY(row)                                     \
    left##row = svmla_f16_x(pairs, left##row, left##row, factor); \
    right##row = svmla_f16_x(pairs, right##row, right##row, factor);
    for (std::int64_t repeat = 0; repeat < repeats; ++repeat) {
        PYTRAIN_EACH_ROW(PYTRAIN_MULTIPLY)
    }
#undef PYTRAIN_MULTIPLY
    V sum = set(0.0f);
#define PYTRAIN_SUM(row) sum = add(sum, add(sum_of_halves(left##row), sum_of_halves(right##row)));
    PYTRAIN_EACH_ROW(PYTRAIN_SUM)
#undef PYTRAIN_SUM
    store(sink, sum);
    return 2.0 * kPair * kTileRows * kTileVectors * static_cast<double>(kLanes) * static_cast<double>(repeats);
}

}  // namespace
}  // namespace pytrain::cpu::sve
