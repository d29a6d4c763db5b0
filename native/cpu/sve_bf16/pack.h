// Packing of panels whose steps are four bf16 of each vector, 64 bits, from bf16 or fp32 (BFCVT: to nearest even).
//
// Bytes: each element is read once and written once as bf16.
#pragma once
#include <cstdint>

#include "cpu/sve_bf16/microkernel.h"

namespace pytrain::cpu::sve_bf16 {
namespace {

using Steps = svuint64_t;  // each lane is a step of one vector

inline svuint32_t round_pairs(V even, V odd) {
    const H lower = svcvt_bf16_f32_x(sve::all(), even);
    return svreinterpret_u32_bf16(svcvtnt_bf16_f32_m(lower, sve::all(), odd));
}

// load_along: as many elements of k as a vector has halves, from p on; those from the n-th on are zero.
// load_lower and load_upper: words of pairs of rows, for the first and for the next kLanes of n columns. A mask without
// lanes stands for a row that is not there.
struct FromBf16 {
    using Element = std::uint16_t;
    static Steps load_along(const Element* p, std::int64_t n) {
        return svreinterpret_u64_u16(svld1_u16(svwhilelt_b16_s64(0, n), p));
    }
    static svuint16_t row(const Element* p, bool there, std::int64_t n) {
        return svld1_u16(svwhilelt_b16_s64(0, there ? n : 0), p);
    }
    static svuint32_t load_lower(const Element* even, const Element* odd, bool even_there, bool odd_there,
                                 std::int64_t n) {
        return svreinterpret_u32_u16(svzip1_u16(row(even, even_there, n), row(odd, odd_there, n)));
    }
    static svuint32_t load_upper(const Element* even, const Element* odd, bool even_there, bool odd_there,
                                 std::int64_t n) {
        return svreinterpret_u32_u16(svzip2_u16(row(even, even_there, n), row(odd, odd_there, n)));
    }
};

struct FromFp32 {
    using Element = float;
    static Steps load_along(const Element* p, std::int64_t n) {
        const V first = svld1_f32(sve::lanes(n), p), second = svld1_vnum_f32(sve::lanes(n - kLanes), p, 1);
        return svreinterpret_u64_u32(round_pairs(svuzp1_f32(first, second), svuzp2_f32(first, second)));
    }
    static svuint32_t load_lower(const Element* even, const Element* odd, bool even_there, bool odd_there,
                                 std::int64_t n) {
        return round_pairs(svld1_f32(sve::lanes(even_there ? n : 0), even),
                           svld1_f32(sve::lanes(odd_there ? n : 0), odd));
    }
    static svuint32_t load_upper(const Element* even, const Element* odd, bool even_there, bool odd_there,
                                 std::int64_t n) {
        const std::int64_t rest = n - kLanes;
        return round_pairs(svld1_vnum_f32(sve::lanes(even_there ? rest : 0), even, 1),
                           svld1_vnum_f32(sve::lanes(odd_there ? rest : 0), odd, 1));
    }
};

// Four vectors become columns [0, n) of `steps` steps of a panel, n <= 4 and steps <= 64-bit lanes: two vectors fill a
// segment of 128 bits with two steps, transposed by itself. See store_columns in sve/pack.h.
inline void store_columns(std::uint64_t* panel, std::int64_t panel_width, std::int64_t steps, std::int64_t n,
                          Steps vector0, Steps vector1, Steps vector2, Steps vector3) {
    const svbool_t all = svptrue_b64();
    const Steps even01 = svtrn1_u64(vector0, vector1), odd01 = svtrn2_u64(vector0, vector1);
    const Steps even23 = svtrn1_u64(vector2, vector3), odd23 = svtrn2_u64(vector2, vector3);
    const svint64_t lane = svindex_s64(0, 1), segment_of_lane = svasr_n_s64_x(all, lane, 1);
    const svint64_t column = svand_n_s64_x(all, lane, 1);
    const svbool_t columns01 = svcmplt_n_s64(all, column, n), columns23 = svcmplt_n_s64(all, column, n - 2);
    std::int64_t at = 0;
    for (std::int64_t segment = 0; 2 * segment < steps; ++segment, at += 2 * (panel_width - 1)) {
        const svbool_t mask01 = svcmpeq_n_s64(columns01, segment_of_lane, segment);
        const svbool_t mask23 = svcmpeq_n_s64(columns23, segment_of_lane, segment);
        svst1_u64(mask01, panel + at, even01);
        svst1_u64(mask23, panel + at + 2, even23);
        if (2 * segment + 1 == steps) break;
        svst1_u64(mask01, panel + at + panel_width, odd01);
        svst1_u64(mask23, panel + at + panel_width + 2, odd23);
    }
}

template <class Source>
void pack_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Source::Element*>(source);
    auto* const to = reinterpret_cast<std::uint64_t*>(panel);
    const std::int64_t depth = 2 * kLanes, steps = (k + 3) / 4;  // depth: elements of a vector of halves
    for (std::int64_t first = 0; first < panel_width; first += 4) {
        const auto* vectors = elements + first * ld;
        const std::int64_t valid = width - first, n = panel_width - first < 4 ? panel_width - first : 4;
        for (std::int64_t p = 0; p < k; p += depth) {
            const std::int64_t rest = k - p, step = p / 4;
            store_columns(to + step * panel_width + first, panel_width,
                          steps - step < depth / 4 ? steps - step : depth / 4, n,
                          Source::load_along(vectors + p, valid > 0 ? rest : 0),
                          Source::load_along(vectors + ld + p, valid > 1 ? rest : 0),
                          Source::load_along(vectors + 2 * ld + p, valid > 2 ? rest : 0),
                          Source::load_along(vectors + 3 * ld + p, valid > 3 ? rest : 0));
        }
    }
}

// Stores two vectors of steps, of consecutive vectors of a panel, as far as there is room.
inline void store_steps(std::uint64_t* panel, std::int64_t room, svuint32_t first, svuint32_t second) {
    const svuint64_t lower = svreinterpret_u64_u32(svzip1_u32(first, second));
    const svuint64_t upper = svreinterpret_u64_u32(svzip2_u32(first, second));
    svst1_u64(svwhilelt_b64_s64(0, room), panel, lower);
    svst1_vnum_u64(svwhilelt_b64_s64(0, room - kLanes / 2), panel, 1, upper);
}

template <class Source>
void pack_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                 std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Source::Element*>(source);
    auto* const to = reinterpret_cast<std::uint64_t*>(panel);
    for (std::int64_t first = 0; first < panel_width; first += 2 * kLanes) {
        const std::int64_t valid = width - first > 0 ? width - first : 0, room = panel_width - first;
        for (std::int64_t p = 0; p < k; p += 4) {
            const auto* row = elements + p * ld + first;
            const bool there1 = p + 1 < k, there2 = p + 2 < k, there3 = p + 3 < k;
            std::uint64_t* const out = to + p / 4 * panel_width + first;
            store_steps(out, room, Source::load_lower(row, row + ld, true, there1, valid),
                        Source::load_lower(row + 2 * ld, row + 3 * ld, there2, there3, valid));
            if (room > kLanes)
                store_steps(out + kLanes, room - kLanes, Source::load_upper(row, row + ld, true, there1, valid),
                            Source::load_upper(row + 2 * ld, row + 3 * ld, there2, there3, valid));
        }
    }
}

}  // namespace
}  // namespace pytrain::cpu::sve_bf16
