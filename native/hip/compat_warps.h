// A wave of 64 lanes made of two warps of 32, for GPUs whose warps are that (NVIDIA's): what compat.h promises of
// exchanges and matrix products, so that kernels need not know. Warps 2w and 2w + 1 are the halves of wave w. What
// crosses from one half to the other goes through `exchange_room` in shared memory, between two barriers of the wave;
// the rest stays within a warp. Included by compat.h alone.
//
// nvcc compiles this text, and so does the shim with PYTRAIN_SHIM_LANES=32, which runs it on the CPU: only the three
// primitives at the top have a version for each.
#pragma once

namespace pytrain::hip {

constexpr int kWarp = 32;

// --- primitives -----------------------------------------------------------------------------------------------------
// wave_barrier: both warps of a wave have come here, and each sees what the other wrote to shared memory before.
// warp_shuffle_xor: the value of lane ^ mask, mask < 32.
// mma_16x8x8: d (16 x 8) = a (16 x 8) b (8 x 8) of 16-bit numbers by one warp, mma.sync.m16n8k8 in PTX. With quad =
// lane / 4 and q = lane % 4, a lane holds rows quad (a[0]) and quad + 8 (a[1]) of a at k 2q and 2q + 1; of b these k at
// column quad; of d rows quad (d[0], d[1]) and quad + 8 (d[2], d[3]) at columns 2q and 2q + 1.

#if defined(PYTRAIN_HIP_SHIM)
inline void wave_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    shim::wave_barrier(file, line);
}
inline float warp_shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
    return shim::shuffle_xor(value, mask, line);
}
template <Format format>
inline void mma_16x8x8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b, int line = __builtin_LINE()) {
    shim::mma_16x8x8(d, a, b, format == Format::bf16, line);
}
#else
// Barrier 0 is the block's.
PYTRAIN_INLINE void wave_barrier() { asm volatile("bar.sync %0, 64;" ::"r"(1 + wave_index()) : "memory"); }
PYTRAIN_INLINE float warp_shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <Format format>
PYTRAIN_INLINE void mma_16x8x8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b) {
    if constexpr (format == Format::bf16)
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.0f));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b), "f"(0.0f));
}
#endif

// --- from one half of a wave to the other ---------------------------------------------------------------------------
// Words of both operands of a matrix product, plane by plane: a plane is one word of each of 32 rows (or columns). In
// 16 bits plane 2h + w is word w of half h: k pairs in order. 33 words from one to the next, so that what the lanes of
// a warp read at once lies in all banks; in fp32 plane h is half h, and 32 words allow reads of four rows at once.
struct alignas(16) ExchangeRoom {
    std::uint32_t left[4 * 33 + 4], right[4 * 33 + 4];
};

PYTRAIN_INLINE ExchangeRoom& exchange_room() {
    PYTRAIN_SHARED(ExchangeRoom, room, kWaves);
    return room[wave_index()];
}

PYTRAIN_INLINE float shuffle_xor(float value, int mask) {
    if (mask < kWarp) return warp_shuffle_xor(value, mask);
    std::uint32_t* const room = exchange_room().left;
    room[lane_index()] = bits_of(value);
    wave_barrier();
    const float other = float_of(room[lane_index() ^ mask]);
    wave_barrier();  // the room is free again
    return other;
}

// --- matrix products ------------------------------------------------------------------------------------------------
// Half h computes the sums that its lanes hold: rows 8 (g / 4) + 4 h + g % 4 (g < 16) of all 32 columns.

struct Sums {
    float value[16];
    PYTRAIN_INLINE float& operator[](int g) { return value[g]; }
    PYTRAIN_INLINE float operator[](int g) const { return value[g]; }
    PYTRAIN_INLINE Sums& operator*=(float factor) {
        PYTRAIN_UNROLL
        for (int g = 0; g < 16; ++g) value[g] *= factor;
        return *this;
    }
};

// Lane q of each four holds x[c] of column c of the four; afterwards column q, x[c] being what lane c held of it.
PYTRAIN_INLINE void transpose_in_fours(float (&x)[4][4]) {
    PYTRAIN_UNROLL
    for (int mask = 1; mask < 4; mask *= 2) {
        const bool upper = (lane_index() & mask) != 0;
        PYTRAIN_UNROLL
        for (int c = 0; c < 4; ++c) {
            if ((c & mask) != 0) continue;
            PYTRAIN_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float got = warp_shuffle_xor(upper ? x[c][i] : x[c | mask][i], mask);
                if (upper)
                    x[c][i] = got;
                else
                    x[c | mask][i] = got;
            }
        }
    }
}

// fp32: operands are never rounded, so that no tensor core may have them. Two k of every sum, in order.
PYTRAIN_INLINE void multiply_words(const ExchangeRoom& room, Sums& sums) {
    const int line = lane_index() % 32, half = lane_index() / 32;
    float product[16];
    PYTRAIN_UNROLL
    for (int k = 0; k < 2; ++k) {
        const float right = float_of(room.right[32 * k + line]);
        PYTRAIN_UNROLL
        for (int rows = 0; rows < 4; ++rows) {
            const Chunk left = *reinterpret_cast<const Chunk*>(room.left + 32 * k + 8 * rows + 4 * half);
            PYTRAIN_UNROLL
            for (int i = 0; i < 4; ++i)
                product[4 * rows + i] =
                    fmaf(float_of(left[i]), right, k == 0 ? sums[4 * rows + i] : product[4 * rows + i]);
        }
    }
    wave_barrier();  // the room is free again
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) sums[g] = product[g];
}

// bf16 and fp16: eight k of every sum on the tensor core, columns of the result being rows of mma.sync: those that it
// leaves with four neighbouring lanes are chosen as their own four, and only these exchange results.
template <Format format>
PYTRAIN_INLINE void multiply_pairs(const ExchangeRoom& room, Sums& sums) {
    const int half = lane_index() / 32, quad = lane_index() % 32 / 4, q = lane_index() % 4;
    std::uint32_t columns[2][2], rows[2];
    PYTRAIN_UNROLL
    for (int i = 0; i < 2; ++i) {
        PYTRAIN_UNROLL
        for (int j = 0; j < 2; ++j) columns[i][j] = room.right[33 * q + 4 * quad + 2 * i + j];
        rows[i] = room.left[33 * q + 8 * (quad / 2) + 4 * half + 2 * i + quad % 2];
    }
    wave_barrier();      // the room is free again
    float result[4][4];  // of column 4 quad + c: rows 8 q + 4 half + 0 to 3
    PYTRAIN_UNROLL
    for (int i = 0; i < 2; ++i) {
        PYTRAIN_UNROLL
        for (int j = 0; j < 2; ++j) {
            float d[4];
            mma_16x8x8<format>(d, columns[i], rows[j]);
            PYTRAIN_UNROLL
            for (int e = 0; e < 4; ++e) result[2 * i + e / 2][2 * j + e % 2] = d[e];
        }
    }
    transpose_in_fours(result);
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) sums[g] += result[g / 4][g % 4];
}

template <Format format>
PYTRAIN_INLINE Sums multiply_part(Chunk a, Chunk b, int part, Sums sums) {
    constexpr int words = format == Format::fp32 ? 1 : 2, plane = format == Format::fp32 ? 32 : 33;
    const int line = lane_index() % 32, half = lane_index() / 32;
    ExchangeRoom& room = exchange_room();
    PYTRAIN_UNROLL
    for (int w = 0; w < words; ++w) {
        room.left[(words * half + w) * plane + line] = a[words * part + w];
        room.right[(words * half + w) * plane + line] = b[words * part + w];
    }
    wave_barrier();
    if constexpr (format == Format::fp32)
        multiply_words(room, sums);
    else
        multiply_pairs<format>(room, sums);
    return sums;
}

}  // namespace pytrain::hip
