// Attention backward in two passes that each compute the weights again, as on the CPU: one block per 128 queries sums
// dq over keys (and delta on its way), then one block per 128 keys of a kv head sums dk and dv over the queries of all
// heads that share it. Every element has one writer and one order of addition: no atomics, the same bits every time.
//
// FLOPs 14 head_size per visible pair; bytes: q, k, v, dout, out once, and the tiles of the other side once per 128
// rows. The matrix units bind. dk and dv together fill head_size registers of every lane, which leaves one wave on a
// SIMD.
#include "hip/attention_tiles.h"
#include "hip/kernels.h"

namespace pytrain::hip {

// sum of dout * out of this lane's query; both halves of the wave get it.
template <Format format, int depth>
PYTRAIN_INLINE float delta_of(const HeadRows& douts, const HeadRows& outs, std::int64_t query) {
    using H = Head<format, depth>;
    float sum = 0.0f;
    PYTRAIN_NO_UNROLL
    for (int s = 0; s < H::kSteps; ++s) {
        const int chunk = 2 * s + lane_index() / 32;
        const Chunk a = head_chunk<format>(douts, query, chunk), b = head_chunk<format>(outs, query, chunk);
        PYTRAIN_UNROLL
        for (int i = 0; i < 4; ++i) {
            if constexpr (H::kFull) {
                sum += float_of(a[i]) * float_of(b[i]);
            } else {
                sum += widened(static_cast<std::uint16_t>(a[i]), H::kDtype) *
                       widened(static_cast<std::uint16_t>(b[i]), H::kDtype);
                sum += widened(static_cast<std::uint16_t>(a[i] >> 16), H::kDtype) *
                       widened(static_cast<std::uint16_t>(b[i] >> 16), H::kDtype);
            }
        }
    }
    return sum + shuffle_xor(sum, 32);
}

// Scores of a tile of keys become dscores of this lane's query, given the products of dout with the values.
PYTRAIN_INLINE void weigh_keys(const QueryBlock& block, std::int64_t key, float scale, float lse, float delta,
                               const Sums& dweights, Sums& weights) {
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) {
        const std::int64_t at = key + 8 * (g / 4) + 4 * (lane_index() / 32) + g % 4;
        const float weight = exp2f(weights[g] * (scale * kLog2E) - lse);
        weights[g] = at >= block.begin && at < block.end ? weight * (dweights[g] - delta) * scale : 0.0f;
    }
}

// The first pass of a block: tiles of keys and values come through LDS, and are added to what this wave's queries get.
template <Format format, int depth>
PYTRAIN_KERNEL attention_dq_kernel(Attention attention, AttentionGradients gradients) {
    using H = Head<format, depth>;
    PYTRAIN_SHARED_FIRST(Chunk, k_rows, H::kRowsChunks);
    PYTRAIN_SHARED(Chunk, k_columns, H::kColumnsChunks);
    PYTRAIN_SHARED(Chunk, v_tile, H::kOneRoom ? 1 : H::kRowsChunks);
    Chunk* const v_rows = H::kOneRoom ? k_rows : v_tile;
    PYTRAIN_SHARED(float, room, kThreads);
    const QueryBlock block(attention);
    const HeadRows douts = out_rows(attention, block.place, gradients.dout);
    const float delta = delta_of<format, depth>(douts, out_rows(attention, block.place, attention.out), block.query);
    const std::int64_t at_query = statistic(attention, block.place, block.query);
    if (block.exists && lane_index() < 32) gradients.delta[at_query] = delta;
    const float lse = block.exists ? attention.lse[at_query] * kLog2E : 0.0f;
    const Fragment<format, depth> q(query_rows(attention, block.place), block.query);
    const FragmentUpTo<format, depth, 208> dout(douts, block.query);
    TileCarrier<format, depth> keys(key_rows(attention, block.place, attention.k, block.block_end)),
        values(key_rows(attention, block.place, attention.v, block.block_end));
    const float scale = score_scale(attention);
    Sums dq[H::kBlocks] = {};

    std::int64_t key = first_tile(attention, block, room);
    fetch_tiles(keys, values, key, block);
    for (; key < block.block_end; key += kTileRows) {
        barrier();  // the tile before has been read
        values.put(key, v_rows, nullptr);
        if (!H::kOneRoom) keys.put(key, k_rows, k_columns);
        barrier();
        fetch_tiles(keys, values, key + kTileRows, block);
        keep_order();  // the loads have the whole of the products to arrive
        const bool sees = block.wave_sees(key);
        Sums dweights = {};
        if (sees) dweights = rows_times_fragment<format, depth>(v_rows, dout);
        if constexpr (H::kOneRoom) {
            barrier();  // the values have been read
            keys.put(key, k_rows, k_columns);
            barrier();
        }
        if (!sees) continue;
        Sums weights = rows_times_fragment<format, depth>(k_rows, q);
        weigh_keys(block, key, scale, lse, delta, dweights, weights);
        add_columns_times_sums<format, depth>(dq, k_rows, k_columns, weights);
    }
    if (block.exists)
        store_columns<format, depth>(gradients.dq, query_element(attention, block.place, block.query),
                                     attention.head_size, dq, 1.0f);
}

// 32 queries of one head in LDS, as the second pass reads them; nullptr where a launch needs none.
struct QueryTile {
    Chunk *q_rows, *q_columns;        // transposed: 16-bit formats, for dk
    Chunk *dout_rows, *dout_columns;  // transposed: 16-bit formats, for dv
    float *lse, *delta;               // log-sum-exp in base 2
    std::int32_t* begin;              // first key
};

// Tiles of the queries of one head on their way from memory through registers into LDS.
template <Format format, int depth>
struct QueryCarrier {
    using H = Head<format, depth>;
    const Attention& attention;
    const AttentionGradients& gradients;
    HeadPlace place;
    TileCarrier<format, depth> queries;
    TileCarrier<format, depth, H::kAhead && !(H::kFull && depth == 128)> douts;
    float lse = 0.0f, delta = 0.0f;  // of query thread % 32
    std::int32_t begin = 0;

    PYTRAIN_INLINE QueryCarrier(const Attention& of, const AttentionGradients& with, const HeadPlace& at_place)
        : attention(of),
          gradients(with),
          place(at_place),
          queries(query_rows(of, at_place)),
          douts(out_rows(of, at_place, with.dout)) {}

    PYTRAIN_INLINE void fetch(std::int64_t at) {
        if (at >= attention.query_rows) return;
        queries.fetch(at);
        douts.fetch(at);
        const std::int64_t mine = least(at + thread_index() % kTileRows, attention.query_rows - 1);
        lse = attention.lse[statistic(attention, place, mine)];
        delta = gradients.delta[statistic(attention, place, mine)];
        begin = first_key(attention, place, mine);
    }
    PYTRAIN_INLINE void put_queries(std::int64_t at, const QueryTile& tile) const {
        queries.put(at, tile.q_rows, tile.q_columns);
    }
    PYTRAIN_INLINE void put_douts(std::int64_t at, const QueryTile& tile) const {
        douts.put(at, tile.dout_rows, tile.dout_columns);
    }
    PYTRAIN_INLINE void put_statistics(const QueryTile& tile) const {
        if (thread_index() >= kTileRows) return;
        tile.lse[thread_index()] = lse * kLog2E;
        tile.delta[thread_index()] = delta;
        tile.begin[thread_index()] = begin;
    }
};

// Queries [first, first + 32) of one head: scores become weights, and products of dout with the values become dscores
// (queries x this wave's keys).
PYTRAIN_INLINE void weigh_queries(const Attention& attention, const QueryTile& tile, std::int64_t first,
                                  std::int64_t key, Sums& weights, Sums& dweights) {
    const float scale = score_scale(attention);
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) {
        const int row = 8 * (g / 4) + 4 * (lane_index() / 32) + g % 4;
        const std::int64_t query = first + row;
        const bool visible =
            query < attention.query_rows && key >= tile.begin[row] && key <= attention.query_offset + query;
        const float weight = visible ? exp2f(weights[g] * (scale * kLog2E) - tile.lse[row]) : 0.0f;
        weights[g] = weight;
        dweights[g] = visible ? weight * (dweights[g] - tile.delta[row]) * scale : 0.0f;
    }
}

// Which gradients a launch of the second pass sums: beyond 160 (fp32: 208) registers do not hold both.
enum class Part : std::uint8_t { both, dk, dv };

// dk and dv of this lane's key, or one of them.
template <Format format, int depth, Part part>
struct KeySums {
    using H = Head<format, depth>;
    static constexpr bool kDk = part != Part::dv, kDv = part != Part::dk;
    Sums dk[kDk ? H::kBlocks : 1] = {}, dv[kDv ? H::kBlocks : 1] = {};

    // A tile of queries at `query` in LDS, and what follows from it. Where q and dout take turns in one room, the
    // first of them is there already.
    PYTRAIN_INLINE void add(const Attention& attention, const QueryCarrier<format, depth>& carrier,
                            const QueryTile& tile, std::int64_t query, std::int64_t key,
                            const FragmentUpTo<format, depth, 128>& k, const FragmentUpTo<format, depth, 128>& v) {
        Sums dweights = {};
        if constexpr (kDk) dweights = rows_times_fragment<format, depth>(tile.dout_rows, v);
        if constexpr (H::kOneRoom && kDk) {
            barrier();  // dout has been read
            carrier.put_queries(query, tile);
            barrier();
        }
        Sums weights = rows_times_fragment<format, depth>(tile.q_rows, k);
        weigh_queries(attention, tile, query, key, weights, dweights);
        if constexpr (H::kOneRoom && kDv) {
            barrier();  // the queries have been read
            carrier.put_douts(query, tile);
            barrier();
        }
        if constexpr (kDv) add_columns_times_sums<format, depth>(dv, tile.dout_rows, tile.dout_columns, weights);
        if constexpr (kDk) add_columns_times_sums<format, depth>(dk, tile.q_rows, tile.q_columns, dweights);
    }

    PYTRAIN_INLINE void write(const Attention& attention, const AttentionGradients& gradients, const HeadPlace& place,
                              std::int64_t key) const {
        if (key >= attention.key_rows) return;
        const std::int64_t first = key_element(attention, place, key);
        if constexpr (kDk) store_columns<format, depth>(gradients.dk, first, attention.head_size, dk, 1.0f);
        if constexpr (kDv) store_columns<format, depth>(gradients.dv, first, attention.head_size, dv, 1.0f);
    }
};

// The second pass of a block: tiles of queries come through LDS, and are added to what this wave's keys get.
template <Format format, int depth, Part part>
PYTRAIN_KERNEL PYTRAIN_WAVES(format != Format::fp32 && depth <= 64 ? 2 : 1)
    attention_dkv_kernel(Attention attention, AttentionGradients gradients) {
    using H = Head<format, depth>;
    constexpr bool sums_dk = part != Part::dv, sums_dv = part != Part::dk;
    constexpr bool dout_in_rows = sums_dk || H::kFull;
    PYTRAIN_SHARED_FIRST(Chunk, q_rows, H::kRowsChunks);
    PYTRAIN_SHARED(Chunk, q_columns, sums_dk ? H::kColumnsChunks : 1);
    PYTRAIN_SHARED(Chunk, dout_tile, !H::kOneRoom && dout_in_rows ? H::kRowsChunks : 1);
    PYTRAIN_SHARED(Chunk, dout_columns, sums_dv ? H::kColumnsChunks : 1);
    PYTRAIN_SHARED(float, lse, kTileRows);
    PYTRAIN_SHARED(float, delta, kTileRows);
    PYTRAIN_SHARED(std::int32_t, begin, kTileRows);
    Chunk* const dout_rows = H::kOneRoom ? q_rows : dout_tile;
    const QueryTile tile{q_rows,
                         sums_dk ? q_columns : nullptr,
                         dout_in_rows ? dout_rows : nullptr,
                         sums_dv ? dout_columns : nullptr,
                         lse,
                         delta,
                         begin};
    const std::int64_t pair = block_row(), group = attention.heads / attention.kv_heads;
    HeadPlace place{pair / attention.kv_heads, 0, pair % attention.kv_heads};
    const std::int64_t block_key = block_index() * kBlockRows,
                       key = block_key + thread_index() / kWave * kTileRows + lane_index() % 32;
    const FragmentUpTo<format, depth, 128> k(key_rows(attention, place, attention.k, attention.key_rows), key),
        v(key_rows(attention, place, attention.v, attention.key_rows), key);
    KeySums<format, depth, part> sums;
    // The first query that sees any of these keys, down to a whole tile.
    const std::int64_t from = block_key > attention.query_offset ? block_key - attention.query_offset : 0;

    for (std::int64_t member = 0; member < group; ++member) {
        place.head = place.kv_head * group + member;
        QueryCarrier<format, depth> carrier(attention, gradients, place);
        std::int64_t query = from / kTileRows * kTileRows;
        carrier.fetch(query);
        for (; query < attention.query_rows; query += kTileRows) {
            barrier();  // the tile before has been read
            if (!H::kOneRoom || sums_dv) carrier.put_queries(query, tile);
            if (!H::kOneRoom || sums_dk) carrier.put_douts(query, tile);
            carrier.put_statistics(tile);
            barrier();
            carrier.fetch(query + kTileRows);
            keep_order();  // the loads have the whole of the products to arrive
            sums.add(attention, carrier, tile, query, key, k, v);
        }
    }
    sums.write(attention, gradients, place, key);
}

template <Format format, int depth>
void launch_backward_depth(const Attention& attention, const AttentionGradients& gradients, hipStream_t queue) {
    const dim3 query_blocks(static_cast<unsigned>(ceil_div(attention.query_rows, kBlockRows)),
                            static_cast<unsigned>(attention.batch * attention.heads));
    const dim3 key_blocks(static_cast<unsigned>(ceil_div(attention.key_rows, kBlockRows)),
                          static_cast<unsigned>(attention.batch * attention.kv_heads));
    constexpr std::size_t kFirst = Head<format, depth>::kRowsBytes;
    PYTRAIN_LAUNCH_FIRST(kFirst, (attention_dq_kernel<format, depth>), query_blocks, queue, attention, gradients);
    if constexpr (depth <= 160 || (format == Format::fp32 && depth <= 208)) {
        PYTRAIN_LAUNCH_FIRST(kFirst, (attention_dkv_kernel<format, depth, Part::both>), key_blocks, queue, attention,
                             gradients);
    } else {
        PYTRAIN_LAUNCH_FIRST(kFirst, (attention_dkv_kernel<format, depth, Part::dk>), key_blocks, queue, attention,
                             gradients);
        PYTRAIN_LAUNCH_FIRST(kFirst, (attention_dkv_kernel<format, depth, Part::dv>), key_blocks, queue, attention,
                             gradients);
    }
}

template <Format format>
void launch_backward(const Attention& attention, const AttentionGradients& gradients, hipStream_t queue) {
#define PYTRAIN_BACKWARD(depth) launch_backward_depth<format, depth>(attention, gradients, queue)
    PYTRAIN_FOR_DEPTH(attention.head_size, PYTRAIN_BACKWARD);
#undef PYTRAIN_BACKWARD
}

void launch_attention_backward(const Attention& attention, const AttentionGradients& gradients, hipStream_t queue) {
    if (attention.batch * attention.query_rows == 0) return;
    switch (attention.q.dtype) {
        case DType::bf16:
            return launch_backward<Format::bf16>(attention, gradients, queue);
        case DType::fp16:
            return launch_backward<Format::fp16>(attention, gradients, queue);
        case DType::fp32:
            return launch_backward<Format::fp32>(attention, gradients, queue);
    }
}

}  // namespace pytrain::hip
