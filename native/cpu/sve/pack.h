// Packing of panels for SVE. The generic one transposes arrays of vectors, which SVE does not have.
//
// Bytes: each source element is read once and written once as fp32.
#pragma once
#include <cstdint>

#include "cpu/sve/simd.h"

namespace pytrain::cpu::sve {
namespace {

template <class Storage>
void pack_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                 std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Storage::Element*>(source);
    for (std::int64_t first = 0; first < panel_width; first += kLanes) {
        const svbool_t valid = lanes(width - first), room = lanes(panel_width - first);
        for (std::int64_t p = 0; p < k; ++p)
            svst1_f32(room, panel + p * panel_width + first, Storage::load_where(valid, elements + p * ld + first));
    }
}

// Four vectors become columns [0, n) of `steps` rows of a panel, n <= 4 and steps <= lanes: each segment of 128 bits is
// transposed by itself, after which segment s of step0 holds row 4 s, that of step1 row 4 s + 1, and so on. A segment
// is stored by a mask that leaves out the others, at an address that lies 4 s lanes before its own.
inline void store_columns(float* panel, std::int64_t panel_width, std::int64_t steps, std::int64_t n, V vector0,
                          V vector1, V vector2, V vector3) {
    const svfloat64_t even01 = svreinterpret_f64_f32(svtrn1_f32(vector0, vector1));
    const svfloat64_t odd01 = svreinterpret_f64_f32(svtrn2_f32(vector0, vector1));
    const svfloat64_t even23 = svreinterpret_f64_f32(svtrn1_f32(vector2, vector3));
    const svfloat64_t odd23 = svreinterpret_f64_f32(svtrn2_f32(vector2, vector3));
    const V step0 = svreinterpret_f32_f64(svtrn1_f64(even01, even23));
    const V step1 = svreinterpret_f32_f64(svtrn1_f64(odd01, odd23));
    const V step2 = svreinterpret_f32_f64(svtrn2_f64(even01, even23));
    const V step3 = svreinterpret_f32_f64(svtrn2_f64(odd01, odd23));
    const svint32_t lane = svindex_s32(0, 1), segment_of_lane = svasr_n_s32_x(all(), lane, 2);
    const svbool_t columns = svcmplt_n_s32(all(), svand_n_s32_x(all(), lane, 3), static_cast<std::int32_t>(n));
    float *const row1 = panel + panel_width, *const row2 = row1 + panel_width, *const row3 = row2 + panel_width;
    const std::int32_t segments = static_cast<std::int32_t>(steps / 4);
    std::int64_t at = 0;
    for (std::int32_t segment = 0; segment < segments; ++segment, at += 4 * (panel_width - 1)) {
        const svbool_t mask = svcmpeq_n_s32(columns, segment_of_lane, segment);
        svst1_f32(mask, panel + at, step0);
        svst1_f32(mask, row1 + at, step1);
        svst1_f32(mask, row2 + at, step2);
        svst1_f32(mask, row3 + at, step3);
    }
    const std::int64_t left = steps % 4;
    const svbool_t mask = svcmpeq_n_s32(columns, segment_of_lane, segments);
    if (left > 0) svst1_f32(mask, panel + at, step0);
    if (left > 1) svst1_f32(mask, row1 + at, step1);
    if (left > 2) svst1_f32(mask, row2 + at, step2);
}

template <class Storage>
void pack_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Storage::Element*>(source);
    for (std::int64_t first = 0; first < panel_width; first += 4) {
        const auto* vectors = elements + first * ld;
        const std::int64_t valid = width - first, n = panel_width - first < 4 ? panel_width - first : 4;
        std::int64_t p = 0;
        if (valid >= 4)
            for (; p + kLanes <= k; p += kLanes)
                store_columns(panel + p * panel_width + first, panel_width, kLanes, 4, Storage::load(vectors + p),
                              Storage::load(vectors + ld + p), Storage::load(vectors + 2 * ld + p),
                              Storage::load(vectors + 3 * ld + p));
        for (; p < k; p += kLanes) {
            const svbool_t steps = lanes(k - p), none = svpfalse_b();
            const V vector0 = Storage::load_where(valid > 0 ? steps : none, vectors + p);
            const V vector1 = Storage::load_where(valid > 1 ? steps : none, vectors + ld + p);
            const V vector2 = Storage::load_where(valid > 2 ? steps : none, vectors + 2 * ld + p);
            const V vector3 = Storage::load_where(valid > 3 ? steps : none, vectors + 3 * ld + p);
            store_columns(panel + p * panel_width + first, panel_width, k - p < kLanes ? k - p : kLanes, n, vector0,
                          vector1, vector2, vector3);
        }
    }
}

}  // namespace
}  // namespace pytrain::cpu::sve
