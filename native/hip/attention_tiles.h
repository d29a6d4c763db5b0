// What attention's kernels share: 32 rows of a head in LDS or in registers, and which keys a query sees.
//
// Everything is arranged so that a wave's 32 queries (or keys) are the columns of its products: the sums of
// scores^T = k q^T lie in registers exactly as the right operand of out^T = v^T weights^T wants them (see compat.h),
// and weights never go through LDS. The maximum of a query is one of 16 registers of two lanes.
#pragma once
#include <type_traits>

#include "hip/common.h"

namespace pytrain::hip {

constexpr int kTileRows = 32;     // keys or queries that a step of the loop takes; also what a wave owns
constexpr int kLdsBytes = 65536;  // of a compute unit

// Compile-time facts of heads of up to `depth` elements (a multiple of 16) in one storage format.
template <Format format, int depth>
struct Head {
    static constexpr bool kFull = format == Format::fp32;
    static constexpr int kPer = kFull ? 4 : 8;         // elements of a chunk
    static constexpr int kChunks = depth / kPer;       // of a row; even
    static constexpr int kSteps = kChunks / 2;         // chunk pairs: a wave's half takes one each
    static constexpr int kBlocks = (depth + 31) / 32;  // 32-row blocks of a product with `depth` rows
    static constexpr int kStride = kChunks | 1;        // chunks between rows in LDS: odd, so that banks are shared out
    static constexpr int kRowsChunks = kTileRows * kStride;
    static constexpr std::size_t kRowsBytes = kRowsChunks * sizeof(Chunk);
    static constexpr int kColumnStride = 5;  // of the transposed tile: 32 keys of 16 bits, and a gap
    static constexpr int kColumnsChunks = kFull ? 1 : depth * kColumnStride;
    static constexpr int kTasks = kTileRows / 2 * kChunks;  // chunks of row pairs
    // Two tiles of rows fit in LDS; otherwise they take turns in one.
    static constexpr bool kOneRoom = 2 * kRowsChunks * 16 > kLdsBytes;
    // The next tiles are fetched while these are multiplied, where registers hold them.
    static constexpr bool kAhead = !kFull || depth <= 128;
    static constexpr DType kDtype = format == Format::bf16   ? DType::bf16
                                    : format == Format::fp16 ? DType::fp16
                                                             : DType::fp32;
};

// Rows of one head in memory: where row 0 lies, and how many there are.
struct HeadRows {
    const char* base;
    std::int64_t stride;  // elements
    std::int64_t rows;
    std::int64_t head_size;
    bool chunks;  // rows and head lie on 16 bytes
};

PYTRAIN_INLINE HeadRows head_rows(const Tensor& x, std::int64_t first, std::int64_t stride, std::int64_t rows,
                                  std::int64_t head_size) {
    const char* const base = address_of(x, first);
    const std::int64_t size = x.dtype == DType::fp32 ? 4 : 2;
    return {base, stride, rows, head_size, on_16_bytes(base) && stride * size % 16 == 0};
}

// Chunk `chunk` of a row; 0 beyond the head and beyond the last row.
template <Format format>
PYTRAIN_INLINE Chunk head_chunk(const HeadRows& rows, std::int64_t row, int chunk) {
    constexpr int per = format == Format::fp32 ? 4 : 8;
    const std::int64_t n = row < rows.rows ? rows.head_size - chunk * per : 0;
    Chunk result = {};
    if (n <= 0) return result;
    const char* const address = rows.base + (row * rows.stride + chunk * per) * (16 / per);
    if (n >= per && rows.chunks) return load_16(address);
    for (int i = 0; i < per; ++i) {
        if (i >= n) break;
        if constexpr (format == Format::fp32)
            result[i] = reinterpret_cast<const std::uint32_t*>(address)[i];
        else
            result[i / 2] |= static_cast<std::uint32_t>(reinterpret_cast<const std::uint16_t*>(address)[i])
                             << (16 * (i % 2));
    }
    return result;
}

// 32 rows on their way from memory through registers into LDS, by all threads of the block: each carries chunks of
// pairs of neighbouring rows. ahead: `fetch` loads the next tile while this one is in use.
template <Format format, int depth, bool ahead = Head<format, depth>::kAhead>
struct TileCarrier {
    using H = Head<format, depth>;
    static constexpr int kCount = (H::kTasks + kThreads - 1) / kThreads;
    struct Pair {
        Chunk low, high;
    };
    HeadRows source;
    bool plain;  // every chunk of a row is whole or wholly beyond the head: loads need no test
    Pair fetched[ahead ? kCount : 1] = {};

    PYTRAIN_INLINE explicit TileCarrier(const HeadRows& rows)
        : source(rows), plain(rows.chunks && rows.head_size % H::kPer == 0 && rows.rows > 0) {}

    // Rows from `first` on into registers, if loads need no test: a branch would make them wait for each other.
    PYTRAIN_INLINE void fetch(std::int64_t first) {
        if constexpr (ahead) {
            if (!plain) return;
            PYTRAIN_UNROLL
            for (int c = 0; c < kCount; ++c) fetched[c] = load_plain(first, thread_index() + c * kThreads);
        }
    }

    // What was fetched, or the same from memory: as it is (`rows`, where a row is a row), and for 16-bit formats
    // transposed (`columns`), where wanted. In the transposed tile a row is one element of the head, and key 8g + 4h +
    // e lies at 16h + 4g + e: a wave's half finds its sixteen keys in two neighbouring chunks.
    PYTRAIN_INLINE void put(std::int64_t first, Chunk* rows, Chunk* columns) const {
        if constexpr (ahead) {
            if (plain) {
                PYTRAIN_UNROLL
                for (int c = 0; c < kCount; ++c) store_pair(fetched[c], thread_index() + c * kThreads, rows, columns);
                return;
            }
        }
        PYTRAIN_NO_UNROLL
        for (int task = thread_index(); task < H::kTasks; task += kThreads) {
            const std::int64_t row = first + task % (kTileRows / 2) * 2;
            const int chunk = task / (kTileRows / 2);
            const Pair pair = {head_chunk<format>(source, row, chunk), head_chunk<format>(source, row + 1, chunk)};
            store_pair(pair, task, rows, columns);
        }
    }

private:
    // Beyond the last row: that one again; no weight falls on it.
    PYTRAIN_INLINE Pair load_plain(std::int64_t first, int task) const {
        const int chunk = task / (kTileRows / 2);
        const std::int64_t row = first + task % (kTileRows / 2) * 2;
        const std::int64_t last = source.rows - 1, stride = source.stride * (16 / H::kPer);
        const char* const column = source.base + (chunk * H::kPer < source.head_size ? chunk * 16 : 0);
        return {load_16(column + least(row, last) * stride), load_16(column + least(row + 1, last) * stride)};
    }

    PYTRAIN_INLINE void store_pair(const Pair& pair, int task, Chunk* rows, Chunk* columns) const {
        const int chunk = task / (kTileRows / 2), row = task % (kTileRows / 2) * 2;
        if (task >= H::kTasks) return;
        const bool inside = chunk * H::kPer < source.head_size;
        const Chunk a = inside ? pair.low : Chunk{}, b = inside ? pair.high : Chunk{};
        if (rows != nullptr) {
            rows[row * H::kStride + chunk] = a;
            rows[(row + 1) * H::kStride + chunk] = b;
        }
        if constexpr (!H::kFull) {
            if (columns == nullptr) return;
            const int place = row % 8 / 4 * 16 + row / 8 * 4 + row % 4;
            std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(columns) + place / 2;
            PYTRAIN_UNROLL
            for (int i = 0; i < 8; ++i) {
                const std::uint32_t x = a[i / 2] >> (16 * (i % 2)), y = b[i / 2] >> (16 * (i % 2));
                words[(chunk * 8 + i) * H::kColumnStride * 4] = (x & 0xffffu) | y << 16;
            }
        }
    }
};

// The row that this lane's column stands for, as right operand: chunk s of this lane's half.
template <Format format, int depth>
struct Fragment {
    static constexpr bool kFar = false;
    Chunk chunk[Head<format, depth>::kSteps];

    PYTRAIN_INLINE Fragment(const HeadRows& rows, std::int64_t row) {
        PYTRAIN_UNROLL
        for (int s = 0; s < Head<format, depth>::kSteps; ++s)
            chunk[s] = head_chunk<format>(rows, row, 2 * s + lane_index() / 32);
    }
    PYTRAIN_INLINE Chunk at(int s) const { return chunk[s]; }
};

// The same from memory each time, for heads that registers cannot hold beside everything else.
template <Format format, int depth>
struct FarFragment {
    static constexpr bool kFar = true;
    HeadRows rows;
    std::int64_t row;

    PYTRAIN_INLINE FarFragment(const HeadRows& of, std::int64_t at_row) : rows(of), row(at_row) {}
    PYTRAIN_INLINE Chunk at(int s) const { return head_chunk<format>(rows, row, 2 * s + lane_index() / 32); }
};

// Fragments of fp32 heads beyond `most` would leave no registers for the rest.
template <Format format, int depth, int most>
using FragmentUpTo =
    std::conditional_t<(format == Format::fp32 && depth > most), FarFragment<format, depth>, Fragment<format, depth>>;

// 32 x 32: rows of a tile in LDS times the fragments of this wave's columns.
template <Format format, int depth, class Right>
PYTRAIN_INLINE Sums rows_times_fragment(const Chunk* rows, const Right& fragment) {
    using H = Head<format, depth>;
    const Chunk* const row = rows + lane_index() % 32 * H::kStride + lane_index() / 32;
    Sums sums = {};
    if constexpr (Right::kFar) {
        PYTRAIN_NO_UNROLL
        for (int s = 0; s < H::kSteps; ++s) sums = multiply<format>(row[2 * s], fragment.at(s), sums);
    } else {
        PYTRAIN_UNROLL
        for (int s = 0; s < H::kSteps; ++s) sums = multiply<format>(row[2 * s], fragment.at(s), sums);
    }
    return sums;
}

// Registers as the right operand of the next product, rounded to the format: chunk q of the tile's rows.
template <Format format>
PYTRAIN_INLINE Chunk chunk_of_sums(const Sums& sums, int q) {
    Chunk chunk = {};
    if constexpr (format == Format::fp32) {
        PYTRAIN_UNROLL
        for (int i = 0; i < 4; ++i) chunk[i] = bits_of(sums[4 * q + i]);
    } else {
        constexpr DType dtype = format == Format::bf16 ? DType::bf16 : DType::fp16;
        PYTRAIN_UNROLL
        for (int i = 0; i < 4; ++i)
            chunk[i] = narrowed(sums[8 * q + 2 * i], dtype) |
                       static_cast<std::uint32_t>(narrowed(sums[8 * q + 2 * i + 1], dtype)) << 16;
    }
    return chunk;
}

// sums (depth x 32, in blocks of 32 rows) += tile^T (depth x 32) * weights (32 x 32 in registers). `rows` and `columns`
// are the tile as load_tile leaves it: fp32 reads single elements down the rows, 16-bit formats chunks of the
// transposed one.
template <Format format, int depth>
PYTRAIN_INLINE void add_columns_times_sums(Sums* sums, const Chunk* rows, const Chunk* columns, const Sums& weights) {
    using H = Head<format, depth>;
    const int line = lane_index() % 32, half = lane_index() / 32;
    constexpr int quarters = H::kFull ? 4 : 2;
    Chunk right[quarters];
    PYTRAIN_UNROLL
    for (int q = 0; q < quarters; ++q) right[q] = chunk_of_sums<format>(weights, q);
    PYTRAIN_UNROLL
    for (int block = 0; block < H::kBlocks; ++block) {
        const int element = 32 * block + line < depth ? 32 * block + line : depth - 1;  // the rest is never stored
        PYTRAIN_UNROLL
        for (int q = 0; q < quarters; ++q) {
            Chunk left;
            if constexpr (H::kFull) {
                const std::uint32_t* const word =
                    reinterpret_cast<const std::uint32_t*>(rows + (8 * q + 4 * half) * H::kStride) + element;
                PYTRAIN_UNROLL
                for (int i = 0; i < 4; ++i) left[i] = word[i * H::kStride * 4];
            } else {
                left = columns[element * H::kColumnStride + 2 * half + q];
            }
            sums[block] = multiply<format>(left, right[q], sums[block]);
        }
    }
}

// Stores column lane % 32 of `sums` times `factor` as row `row` of a head: four neighbours at a time.
template <Format format, int depth>
PYTRAIN_INLINE void store_columns(const Tensor& x, std::int64_t first, std::int64_t head_size, const Sums* sums,
                                  float factor) {
    using H = Head<format, depth>;
    const int half = lane_index() / 32;
    const bool aligned = reinterpret_cast<std::uintptr_t>(address_of(x, first)) % (H::kFull ? 16 : 8) == 0;
    PYTRAIN_UNROLL
    for (int block = 0; block < H::kBlocks; ++block) {
        PYTRAIN_UNROLL
        for (int g = 0; g < 4; ++g) {
            const int element = 32 * block + 8 * g + 4 * half;
            float value[4];
            PYTRAIN_UNROLL
            for (int i = 0; i < 4; ++i) value[i] = sums[block][4 * g + i] * factor;
            if (element + 4 <= head_size && aligned) {
                char* const address = const_cast<char*>(address_of(x, first + element));
                if constexpr (H::kFull) {
                    Chunk chunk;
                    PYTRAIN_UNROLL
                    for (int i = 0; i < 4; ++i) chunk[i] = bits_of(value[i]);
                    store_16(address, chunk);
                } else {
                    const std::uint32_t low =
                        narrowed(value[0], H::kDtype) | static_cast<std::uint32_t>(narrowed(value[1], H::kDtype)) << 16;
                    const std::uint32_t high =
                        narrowed(value[2], H::kDtype) | static_cast<std::uint32_t>(narrowed(value[3], H::kDtype)) << 16;
                    *reinterpret_cast<std::uint64_t*>(address) = low | static_cast<std::uint64_t>(high) << 32;
                }
                continue;
            }
            PYTRAIN_UNROLL
            for (int i = 0; i < 4; ++i)
                if (element + i < head_size) store(x, first + element + i, value[i]);
        }
    }
}

// Where one head of one sequence lies, and what its queries see.
struct HeadPlace {
    std::int64_t sequence, head, kv_head;
};

PYTRAIN_INLINE std::int64_t query_element(const Attention& attention, const HeadPlace& place, std::int64_t query) {
    return place.sequence * attention.q_batch_stride + query * attention.q_stride + place.head * attention.head_size;
}
PYTRAIN_INLINE std::int64_t key_element(const Attention& attention, const HeadPlace& place, std::int64_t key) {
    return place.sequence * attention.kv_batch_stride + key * attention.kv_stride + place.kv_head * attention.head_size;
}
PYTRAIN_INLINE std::int64_t out_element(const Attention& attention, const HeadPlace& place, std::int64_t query) {
    return ((place.sequence * attention.query_rows + query) * attention.heads + place.head) * attention.head_size;
}
PYTRAIN_INLINE std::int64_t statistic(const Attention& attention, const HeadPlace& place, std::int64_t query) {
    return (place.sequence * attention.heads + place.head) * attention.query_rows + query;
}
PYTRAIN_INLINE std::int32_t first_key(const Attention& attention, const HeadPlace& place, std::int64_t query) {
    return attention.document_starts == nullptr
               ? 0
               : attention.document_starts[place.sequence * attention.query_rows + query];
}

PYTRAIN_INLINE HeadRows query_rows(const Attention& attention, const HeadPlace& place) {
    return head_rows(attention.q, query_element(attention, place, 0), attention.q_stride, attention.query_rows,
                     attention.head_size);
}
// Keys or values before `end`: a cache may hold anything beyond what its queries see.
PYTRAIN_INLINE HeadRows key_rows(const Attention& attention, const HeadPlace& place, const Tensor& x,
                                 std::int64_t end) {
    return head_rows(x, key_element(attention, place, 0), attention.kv_stride, end, attention.head_size);
}
PYTRAIN_INLINE HeadRows out_rows(const Attention& attention, const HeadPlace& place, const Tensor& x) {
    return head_rows(x, out_element(attention, place, 0), attention.heads * attention.head_size, attention.query_rows,
                     attention.head_size);
}

constexpr float kLog2E = 1.4426950408889634f;

PYTRAIN_INLINE float score_scale(const Attention& attention) {
    return 1.0f / sqrtf(static_cast<float>(attention.head_size));
}

constexpr int kBlockRows = kWaves * kTileRows;  // queries or keys of a block

// The least first key of a block's 128 queries from `query` on.
PYTRAIN_INLINE std::int64_t least_first_key(const Attention& attention, const HeadPlace& place, std::int64_t query,
                                            float* room) {
    if (attention.document_starts == nullptr) return 0;
    const std::int64_t mine = least(query + thread_index() / (kThreads / kBlockRows), attention.query_rows - 1);
    // Exact in fp32 up to 2^24 positions.
    return static_cast<std::int64_t>(-block_maximum(-static_cast<float>(first_key(attention, place, mine)), room));
}

// 128 queries of one head, as forward and the first pass of backward take them: a block's, of which each wave owns 32,
// and each lane (with its other half) one; and which keys they see.
struct QueryBlock {
    HeadPlace place;
    std::int64_t first, wave_first, query;  // of the block, of this wave; this lane's
    std::int64_t rows;                      // queries that there are
    std::int64_t begin, end;                // keys that this lane's query sees
    std::int64_t wave_end, block_end;       // no query of the wave, of the block, sees a key from here on
    bool exists;                            // whether this lane has a query

    PYTRAIN_INLINE explicit QueryBlock(const Attention& attention) {
        const std::int64_t pair = block_row(), group = attention.heads / attention.kv_heads;
        place = {pair / attention.heads, pair % attention.heads, pair % attention.heads / group};
        // The last blocks see the most keys: they go first.
        first = (block_count() - 1 - block_index()) * kBlockRows;
        wave_first = first + wave_index() * kTileRows;
        query = wave_first + lane_index() % 32;
        rows = attention.query_rows;
        exists = query < rows;
        begin = exists ? first_key(attention, place, query) : 0;
        end = exists ? attention.query_offset + query + 1 : 0;
        wave_end = attention.query_offset + least(wave_first + kTileRows, rows);
        block_end = attention.query_offset + least(first + kBlockRows, rows);
    }

    // Whether any query of the wave sees a key of the tile at `key`: the same in the whole wave.
    PYTRAIN_INLINE bool wave_sees(std::int64_t key) const { return wave_first < rows && key < wave_end; }
};

// Where the block's loop over tiles of keys begins: at the tile of the least first key of its queries.
PYTRAIN_INLINE std::int64_t first_tile(const Attention& attention, const QueryBlock& block, float* room) {
    return least_first_key(attention, block.place, block.first, room) / kTileRows * kTileRows;
}

// Keys and values from `key` on into registers, if the block sees any of them.
template <class Keys, class Values>
PYTRAIN_INLINE void fetch_tiles(Keys& keys, Values& values, std::int64_t key, const QueryBlock& block) {
    if (key >= block.block_end) return;
    keys.fetch(key);
    values.fetch(key);
}

// launch(depth) with the least depth that holds a head: what kernels are compiled for.
#define PYTRAIN_FOR_DEPTH(head_size, launch) \
    do {                                     \
        if ((head_size) <= 64)               \
            launch(64);                      \
        else if ((head_size) <= 96)          \
            launch(96);                      \
        else if ((head_size) <= 128)         \
            launch(128);                     \
        else if ((head_size) <= 160)         \
            launch(160);                     \
        else if ((head_size) <= 208)         \
            launch(208);                     \
        else                                 \
            launch(256);                     \
    } while (false)

}  // namespace pytrain::hip
