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

template <Format format, int depth>
PYTRAIN_KERNEL attention_dq_kernel(Attention attention, AttentionGradients gradients) {
    using H = Head<format, depth>;
    PYTRAIN_SHARED_FIRST(Chunk, k_rows, H::kRowsChunks);
    PYTRAIN_SHARED(Chunk, k_columns, H::kColumnsChunks);
    PYTRAIN_SHARED(Chunk, v_tile, H::kOneRoom ? 1 : H::kRowsChunks);
    Chunk* const v_rows = H::kOneRoom ? k_rows : v_tile;
    PYTRAIN_SHARED(float, room, kThreads);
    const std::int64_t pair = block_row(), group = attention.heads / attention.kv_heads;
    const HeadPlace place{pair / attention.heads, pair % attention.heads, pair % attention.heads / group};
    const std::int64_t block_query = (block_count() - 1 - block_index()) * kBlockRows;
    const std::int64_t wave_query = block_query + wave_index() * kTileRows;
    const std::int64_t query = wave_query + lane_index() % 32;
    const bool exists = query < attention.query_rows;
    const std::int64_t begin = exists ? first_key(attention, place, query) : 0;
    const std::int64_t end = exists ? attention.query_offset + query + 1 : 0;
    const std::int64_t block_end = attention.query_offset + least(block_query + kBlockRows, attention.query_rows);
    const std::int64_t wave_end = attention.query_offset + least(wave_query + kTileRows, attention.query_rows);

    const HeadRows douts = out_rows(attention, place, gradients.dout), outs = out_rows(attention, place, attention.out);
    const float delta = delta_of<format, depth>(douts, outs, query);
    if (exists && lane_index() < 32) gradients.delta[statistic(attention, place, query)] = delta;
    const float lse = exists ? attention.lse[statistic(attention, place, query)] * kLog2E : 0.0f;
    const Fragment<format, depth> q(query_rows(attention, place), query);
    const FragmentUpTo<format, depth, 208> dout(douts, query);
    TileCarrier<format, depth> keys(key_rows(attention, place, attention.k, block_end)),
        values(key_rows(attention, place, attention.v, block_end));
    const float scale = score_scale(attention);
    Sums dq[H::kBlocks] = {};

    std::int64_t key = least_first_key(attention, place, block_query, room) / kTileRows * kTileRows;
    const auto fetch = [&](std::int64_t at) {
        if (at >= block_end) return;
        keys.fetch(at);
        values.fetch(at);
    };
    fetch(key);
    for (; key < block_end; key += kTileRows) {
        barrier();  // the tile before has been read
        values.put(key, v_rows, nullptr);
        if (!H::kOneRoom) keys.put(key, k_rows, k_columns);
        barrier();
        fetch(key + kTileRows);
        keep_order();  // the loads have the whole of the products to arrive
        const bool sees = wave_query < attention.query_rows && key < wave_end;  // the same in the whole wave
        Sums dweights = {};
        if (sees) dweights = rows_times_fragment<format, depth>(v_rows, dout);
        if constexpr (H::kOneRoom) {
            barrier();  // the values have been read
            keys.put(key, k_rows, k_columns);
            barrier();
        }
        if (!sees) continue;
        Sums weights = rows_times_fragment<format, depth>(k_rows, q);
        PYTRAIN_UNROLL
        for (int g = 0; g < 16; ++g) {
            const std::int64_t at = key + 8 * (g / 4) + 4 * (lane_index() / 32) + g % 4;
            const float weight = exp2f(weights[g] * (scale * kLog2E) - lse);
            weights[g] = at >= begin && at < end ? weight * (dweights[g] - delta) * scale : 0.0f;
        }
        add_columns_times_sums<format, depth>(dq, k_rows, k_columns, weights);
    }
    if (exists)
        store_columns<format, depth>(gradients.dq, query_element(attention, place, query), attention.head_size, dq,
                                     1.0f);
}

// What the other kernel needs of a tile of queries: log-sum-exp, delta, first key; in LDS.
struct QueryStatistics {
    float* lse;
    float* delta;
    std::int32_t* begin;
};

// Queries [first, first + 32) of one head: weights and dscores (queries x this wave's keys).
template <class Left, class Right>
PYTRAIN_INLINE void weigh(const Attention& attention, const QueryStatistics& statistics, std::int64_t first,
                          std::int64_t key, Left& weights, Right& dweights) {
    const float scale = score_scale(attention);
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) {
        const int row = 8 * (g / 4) + 4 * (lane_index() / 32) + g % 4;
        const std::int64_t query = first + row;
        const bool visible =
            query < attention.query_rows && key >= statistics.begin[row] && key <= attention.query_offset + query;
        const float weight = visible ? exp2f(weights[g] * (scale * kLog2E) - statistics.lse[row]) : 0.0f;
        weights[g] = weight;
        dweights[g] = visible ? weight * (dweights[g] - statistics.delta[row]) * scale : 0.0f;
    }
}

// Which gradients a launch of the second pass sums: beyond 160 (fp32: 208) registers do not hold both.
enum class Part : std::uint8_t { both, dk, dv };

// The second pass of a block: tiles of queries come through LDS, and are added to what this wave's keys get.
template <Format format, int depth, Part part>
PYTRAIN_KERNEL PYTRAIN_WAVES(format != Format::fp32 && depth <= 64 ? 2 : 1)
    attention_dkv_kernel(Attention attention, AttentionGradients gradients) {
    using H = Head<format, depth>;
    constexpr bool sums_dk = part != Part::dv, sums_dv = part != Part::dk;
    PYTRAIN_SHARED_FIRST(Chunk, q_rows, H::kRowsChunks);
    PYTRAIN_SHARED(Chunk, q_columns, sums_dk ? H::kColumnsChunks : 1);
    PYTRAIN_SHARED(Chunk, dout_tile, !H::kOneRoom && (sums_dk || H::kFull) ? H::kRowsChunks : 1);
    PYTRAIN_SHARED(Chunk, dout_columns, sums_dv ? H::kColumnsChunks : 1);
    PYTRAIN_SHARED(float, lse, kTileRows);
    PYTRAIN_SHARED(float, delta, kTileRows);
    PYTRAIN_SHARED(std::int32_t, begin, kTileRows);
    Chunk* const dout_rows = H::kOneRoom ? q_rows : dout_tile;
    const std::int64_t pair = block_row(), group = attention.heads / attention.kv_heads;
    HeadPlace place{pair / attention.kv_heads, 0, pair % attention.kv_heads};
    const std::int64_t block_key = block_index() * kBlockRows,
                       key = block_key + thread_index() / kWave * kTileRows + lane_index() % 32;
    const FragmentUpTo<format, depth, 128> k(key_rows(attention, place, attention.k, attention.key_rows), key),
        v(key_rows(attention, place, attention.v, attention.key_rows), key);
    Sums dk[sums_dk ? H::kBlocks : 1] = {}, dv[sums_dv ? H::kBlocks : 1] = {};
    // The first query that sees any of these keys, down to a whole tile.
    const std::int64_t from = block_key > attention.query_offset ? block_key - attention.query_offset : 0;

    for (std::int64_t member = 0; member < group; ++member) {
        place.head = place.kv_head * group + member;
        TileCarrier<format, depth> queries(query_rows(attention, place));
        TileCarrier<format, depth, H::kAhead && !(H::kFull && depth == 128)> douts(
            out_rows(attention, place, gradients.dout));
        float next_lse = 0.0f, next_delta = 0.0f;
        std::int32_t next_begin = 0;
        const auto fetch = [&](std::int64_t at) {
            if (at >= attention.query_rows) return;
            queries.fetch(at);
            douts.fetch(at);
            const std::int64_t mine = least(at + thread_index() % kTileRows, attention.query_rows - 1);
            next_lse = attention.lse[statistic(attention, place, mine)];
            next_delta = gradients.delta[statistic(attention, place, mine)];
            next_begin = first_key(attention, place, mine);
        };
        std::int64_t query = from / kTileRows * kTileRows;
        const auto put_queries = [&] { queries.put(query, q_rows, sums_dk ? q_columns : nullptr); };
        const auto put_douts = [&] {
            douts.put(query, sums_dk || H::kFull ? dout_rows : nullptr, sums_dv ? dout_columns : nullptr);
        };
        fetch(query);
        for (; query < attention.query_rows; query += kTileRows) {
            barrier();  // the tile before has been read
            if (!H::kOneRoom || sums_dv) put_queries();
            if (!H::kOneRoom || sums_dk) put_douts();
            if (thread_index() < kTileRows) {
                lse[thread_index()] = next_lse * kLog2E;
                delta[thread_index()] = next_delta;
                begin[thread_index()] = next_begin;
            }
            barrier();
            fetch(query + kTileRows);
            keep_order();  // the loads have the whole of the products to arrive
            Sums dweights = {};
            if constexpr (sums_dk) dweights = rows_times_fragment<format, depth>(dout_rows, v);
            if constexpr (H::kOneRoom && sums_dk) {
                barrier();  // dout has been read
                put_queries();
                barrier();
            }
            Sums weights = rows_times_fragment<format, depth>(q_rows, k);
            weigh(attention, {lse, delta, begin}, query, key, weights, dweights);
            if constexpr (H::kOneRoom && sums_dv) {
                barrier();  // the queries have been read
                put_douts();
                barrier();
            }
            if constexpr (sums_dv) add_columns_times_sums<format, depth>(dv, dout_rows, dout_columns, weights);
            if constexpr (sums_dk) add_columns_times_sums<format, depth>(dk, q_rows, q_columns, dweights);
        }
    }
    if (key >= attention.key_rows) return;
    const std::int64_t first = key_element(attention, place, key);
    if constexpr (sums_dk) store_columns<format, depth>(gradients.dk, first, attention.head_size, dk, 1.0f);
    if constexpr (sums_dv) store_columns<format, depth>(gradients.dv, first, attention.head_size, dv, 1.0f);
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
