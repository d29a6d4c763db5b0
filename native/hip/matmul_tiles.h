// How tiles of the operands of a product come from memory through LDS into registers (kernels/matmul.hip).
#pragma once
#include "hip/common.h"

namespace pytrain::hip {

constexpr int kTile = 128;     // rows and columns of c that a block computes
constexpr int kRowBytes = 64;  // of one row of an operand in LDS
constexpr int kBufferBytes = kTile * kRowBytes;

// One side of the product: rows of c (or its columns) and k. `along`: neighbours in memory are neighbours in k.
struct Operand {
    Tensor x;
    std::int64_t ld, rows, depth;
    bool chunks;  // whole chunks may be read where they begin inside: base and rows lie on 16 bytes
};

template <Format format>
struct Element {
    using Type = std::uint16_t;
    static constexpr int kPerChunk = 8;
};
template <>
struct Element<Format::fp32> {
    using Type = float;
    static constexpr int kPerChunk = 4;
};

// Where a chunk (16 bytes; four to a row) lies in LDS. Two rows share a line of 128 bytes, which spans all banks; the
// exclusive-or spreads what eight neighbouring lanes read, and what the lanes of a transposing store write, over it.
PYTRAIN_INLINE int place_of(int row, int chunk) {
    return (row >> 1) * 128 + ((((row & 1) * 4 + chunk) ^ ((row >> 1) & 3) ^ ((row >> 3) & 7)) * 16);
}

// One element as LDS holds it; 0 outside.
template <Format format, bool along>
PYTRAIN_INLINE typename Element<format>::Type element(const Operand& operand, std::int64_t row, std::int64_t k) {
    if (row >= operand.rows || k >= operand.depth) return 0;
    const std::int64_t i = along ? row * operand.ld + k : k * operand.ld + row;
    if constexpr (format == Format::fp32)
        return load(operand.x, i);
    else
        return static_cast<const std::uint16_t*>(operand.x.data)[i];
}

// Eight 16-bit or four fp32 neighbours: 16 bytes in LDS, 8 in memory where 16-bit storage is widened (never, where both
// operands are stored as they are multiplied: a branch would end the loop's one block of code).
template <Format format, bool stored_wide>
PYTRAIN_INLINE Chunk load_chunk(GlobalBytes address, DType dtype) {
    if (format != Format::fp32 || stored_wide || dtype == DType::fp32) return load_global<Chunk>(address);
    const auto four = load_global<std::uint64_t>(address);
    Chunk chunk;
    PYTRAIN_UNROLL
    for (int j = 0; j < 4; ++j) chunk[j] = bits_of(widened(static_cast<std::uint16_t>(four >> (16 * j)), dtype));
    return chunk;
}

// What one thread carries of an operand's tile from memory to LDS: two chunks.
// along: chunk thread % 4 of rows thread / 4 and thread / 4 + 64.
// else: the same rows of two neighbouring k, which become pairs in LDS.
template <Format format, bool along>
struct Carrier {
    static constexpr int kPer = Element<format>::kPerChunk;
    static constexpr int kDepth = kRowBytes / 16 * kPer;  // k of one step
    static constexpr int kRowBlocks = kTile / kPer;

    int row, k;                   // of the first chunk, within the tile
    GlobalBytes base;             // of the tile at this step's k: the same in all threads, so that scalars advance it
    std::int64_t step;            // bytes from one step's k to the next
    std::uint32_t first, second;  // bytes from there to this thread's chunks
    Chunk chunk[2] = {};

    PYTRAIN_INLINE Carrier(const Operand& operand, std::int64_t tile_row, std::int64_t first_step) {
        const int thread = thread_index();
        const std::int64_t size = operand.x.dtype == DType::fp32 ? 4 : 2, last = operand.rows - 1 - tile_row;
        base = (GlobalBytes)operand.x.data + (along ? tile_row * operand.ld : tile_row) * size;
        step = (along ? kDepth : kDepth * operand.ld) * size;
        base += first_step * step;
        if constexpr (along) {
            row = thread / 4;
            k = thread % 4 * kPer;
            // Rows beyond the last are read as the last: what they add is never stored.
            first = static_cast<std::uint32_t>((least(row, last) * operand.ld + k) * size);
            second = static_cast<std::uint32_t>((least(row + kTile / 2, last) * operand.ld + k) * size);
        } else {
            row = thread % kRowBlocks * kPer;
            k = thread / kRowBlocks * 2;
            first = static_cast<std::uint32_t>((k * operand.ld + least(row, last / kPer * kPer)) * size);
            second = first + static_cast<std::uint32_t>(operand.ld * size);
        }
    }

    // The next whole tile, by chunks.
    template <bool stored_wide>
    PYTRAIN_INLINE void fetch(const Operand& operand) {
        chunk[0] = load_chunk<format, stored_wide>(base + kept_offset(first), operand.x.dtype);
        chunk[1] = load_chunk<format, stored_wide>(base + kept_offset(second), operand.x.dtype);
        base = kept_scalar(base + step);
    }

    // Any tile, element by element.
    PYTRAIN_INLINE void fetch_edge(const Operand& operand, std::int64_t tile_row, std::int64_t k0) {
        PYTRAIN_UNROLL
        for (int c = 0; c < 2; ++c) {
            PYTRAIN_UNROLL
            for (int word = 0; word < 4; ++word) {
                std::uint32_t bits = 0;
                PYTRAIN_UNROLL
                for (int part = 0; part < kPer / 4; ++part) {
                    const int j = word * (kPer / 4) + part;
                    const std::int64_t at_row = along ? tile_row + row + c * (kTile / 2) : tile_row + row + j;
                    const std::int64_t at_k = along ? k0 + k + j : k0 + k + c;
                    const auto value = element<format, along>(operand, at_row, at_k);
                    if constexpr (format == Format::fp32)
                        bits = bits_of(value);
                    else
                        bits |= static_cast<std::uint32_t>(value) << (16 * part);
                }
                chunk[c][word] = bits;
            }
        }
    }

    // Quarter by quarter, so that what writes to LDS fits between matrix instructions.
    PYTRAIN_INLINE void store_quarter(char* buffer, int quarter) const {
        if constexpr (along) {
            if (quarter >= 2) return;
            *reinterpret_cast<Chunk*>(buffer + place_of(row + quarter * (kTile / 2), thread_index() % 4)) =
                chunk[quarter];
        } else if constexpr (format == Format::fp32) {
            const std::uint64_t pair = chunk[0][quarter] | static_cast<std::uint64_t>(chunk[1][quarter]) << 32;
            *reinterpret_cast<std::uint64_t*>(buffer + place_of(row + quarter, k / 4) + k % 4 * 4) = pair;
        } else {
            PYTRAIN_UNROLL
            for (int j = 2 * quarter; j < 2 * quarter + 2; ++j) {
                const std::uint32_t low = chunk[0][j / 2] >> (16 * (j % 2)), high = chunk[1][j / 2] >> (16 * (j % 2));
                *reinterpret_cast<std::uint32_t*>(buffer + place_of(row + j, k / 8) + k % 8 * 2) =
                    (low & 0xffffu) | high << 16;
            }
        }
    }

    PYTRAIN_INLINE void store_to(char* buffer) const {
        PYTRAIN_UNROLL
        for (int quarter = 0; quarter < 4; ++quarter) store_quarter(buffer, quarter);
    }
};

// What a lane reads of both operands for half a step: rows 0 to 31 and 32 to 63 of its wave's.
struct Fragments {
    Chunk a[2], b[2];

    PYTRAIN_INLINE void load(const char* left, const char* right, int wave_row, int wave_column, int s) {
        const int line = lane_index() % 32, half = lane_index() / 32;
        PYTRAIN_UNROLL
        for (int i = 0; i < 2; ++i) {
            a[i] = *reinterpret_cast<const Chunk*>(left + place_of(wave_row + 32 * i + line, 2 * s + half));
            b[i] = *reinterpret_cast<const Chunk*>(right + place_of(wave_column + 32 * i + line, 2 * s + half));
        }
    }
};

}  // namespace pytrain::hip
