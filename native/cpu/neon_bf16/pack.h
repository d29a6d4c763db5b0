// Packing of panels whose steps are four bf16 of each vector, 64 bits, from bf16 or fp32 (BFCVTN: to nearest even).
//
// Bytes: each element is read once and written once as bf16. NEON has no masked load or store: what is cut off goes
// through copies on the stack.
#pragma once
#include <cstdint>

#include "cpu/generic/unroll.h"
#include "cpu/neon/simd.h"  // and the intrinsics

namespace pytrain::cpu::neon_bf16 {
namespace {

constexpr std::int64_t kHalves = 8;        // of a vector: two steps
constexpr std::int64_t kAheadBytes = 256;  // see generic/pack.inl

inline std::int64_t at_most(std::int64_t n, std::int64_t most) { return n < most ? n : most; }

// Eight neighbouring elements as bf16.
struct FromBf16 {
    using Element = std::uint16_t;
    static uint16x8_t load(const Element* p) { return vld1q_u16(p); }
};

struct FromFp32 {
    using Element = float;
    static uint16x8_t load(const Element* p) {
        const bfloat16x8_t lower = vcvtq_low_bf16_f32(vld1q_f32(p));
        return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(lower, vld1q_f32(p + 4)));
    }
};

// The first n of them, then zeros.
template <class Source>
uint16x8_t load_n(const typename Source::Element* p, std::int64_t n) {
    if (n >= kHalves) {
        __builtin_prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
        return Source::load(p);
    }
    typename Source::Element some[kHalves] = {};
    for (std::int64_t i = 0; i < n; ++i) some[i] = p[i];
    return Source::load(some);
}

// Two steps, of two neighbouring vectors of a panel, or of the first of them where there is room for one.
inline void store_two(std::uint64_t* panel, std::int64_t room, uint64x2_t steps) {
    if (room >= 2)
        vst1q_u64(panel, steps);
    else if (room == 1)
        vst1q_lane_u64(panel, steps, 0);
}

template <class Source>
void pack_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Source::Element*>(source);
    auto* const to = reinterpret_cast<std::uint64_t*>(panel);
    for (std::int64_t first = 0; first < panel_width; first += 2) {
        const auto* vectors = elements + first * ld;
        const std::int64_t valid = width - first, room = panel_width - first;
        for (std::int64_t p = 0; p < k; p += kHalves) {
            const std::int64_t rest = k - p;
            const uint64x2_t vector0 = vreinterpretq_u64_u16(load_n<Source>(vectors + p, valid > 0 ? rest : 0));
            const uint64x2_t vector1 = vreinterpretq_u64_u16(load_n<Source>(vectors + ld + p, valid > 1 ? rest : 0));
            std::uint64_t* const out = to + p / 4 * panel_width + first;
            store_two(out, room, vtrn1q_u64(vector0, vector1));
            if (rest > 4) store_two(out + panel_width, room, vtrn2q_u64(vector0, vector1));
        }
    }
}

// Four rows of eight columns become a step of eight vectors.
inline void store_step(std::uint64_t* panel, std::int64_t room, const uint16x8_t (&rows)[4]) {
    const uint32x4_t words[2][2] = {
        {vreinterpretq_u32_u16(vzip1q_u16(rows[0], rows[1])), vreinterpretq_u32_u16(vzip1q_u16(rows[2], rows[3]))},
        {vreinterpretq_u32_u16(vzip2q_u16(rows[0], rows[1])), vreinterpretq_u32_u16(vzip2q_u16(rows[2], rows[3]))}};
    PYTRAIN_UNROLL
    for (int half = 0; half < 2; ++half) {
        const uint32x4_t first = words[half][0], second = words[half][1];
        store_two(panel + 4 * half, room - 4 * half, vreinterpretq_u64_u32(vzip1q_u32(first, second)));
        store_two(panel + 4 * half + 2, room - 4 * half - 2, vreinterpretq_u64_u32(vzip2q_u32(first, second)));
    }
}

template <class Source>
void pack_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                 std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Source::Element*>(source);
    auto* const to = reinterpret_cast<std::uint64_t*>(panel);
    for (std::int64_t p = 0; p < k; p += 4)
        for (std::int64_t first = 0; first < panel_width; first += kHalves) {
            const auto* row = elements + p * ld + first;
            const std::int64_t valid = at_most(width - first, kHalves);
            uint16x8_t rows[4];
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < 4; ++i) rows[i] = load_n<Source>(row + i * ld, p + i < k ? valid : 0);
            store_step(to + p / 4 * panel_width + first, panel_width - first, rows);
        }
}

}  // namespace
}  // namespace pytrain::cpu::neon_bf16
