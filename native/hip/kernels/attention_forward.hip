// Attention forward on the matrix units. A block takes 128 queries of one head, each of its four waves 32; tiles of 32
// keys and values go through LDS. The matrix of scores never exists (Dao et al., "FlashAttention", 2022).
//
// FLOPs 4 head_size per visible pair, of which the causal edge wastes at most 31 keys per query; bytes: q and out once,
// k and v once per 128 queries. The matrix units bind from about 100 keys on.
#include "hip/attention_tiles.h"
#include "hip/kernels.h"

namespace pytrain::hip {

// Scores (keys of the tile x 32 queries) become weights; what is known of each query so far is scaled to the new
// maximum. largest and denominator are those of this lane's query, in base-2 logarithms of scores; largest agrees in
// both halves.
template <int blocks>
PYTRAIN_INLINE void softmax_step(Sums& scores, Sums (&sums)[blocks], float& largest, float& denominator, float scale,
                                 std::int64_t key, std::int64_t begin, std::int64_t end) {
    const int half = lane_index() / 32;
    float highest = -INFINITY;
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) {
        const std::int64_t at = key + 8 * (g / 4) + 4 * half + g % 4;
        scores[g] = at >= begin && at < end ? scores[g] * scale : -INFINITY;
        highest = fmaxf(highest, scores[g]);
    }
    highest = fmaxf(highest, shuffle_xor(highest, 32));
    const float before = largest;
    largest = fmaxf(before, highest);
    const float shift = largest == -INFINITY ? 0.0f : largest;
    const float factor = exp2f(before - shift);
    float sum = 0.0f;
    PYTRAIN_UNROLL
    for (int g = 0; g < 16; ++g) {
        scores[g] = exp2f(scores[g] - shift);
        sum += scores[g];
    }
    denominator = denominator * factor + sum;
    PYTRAIN_UNROLL
    for (int block = 0; block < blocks; ++block) sums[block] *= factor;
}

template <Format format, int depth>
PYTRAIN_KERNEL PYTRAIN_WAVES((format == Format::fp32 ? depth <= 64 : depth <= 160) ? 2 : 1)
    attention_forward_kernel(Attention attention) {
    using H = Head<format, depth>;
    PYTRAIN_SHARED_FIRST(Chunk, k_rows, H::kRowsChunks);
    constexpr int kValues = H::kOneRoom ? 1 : H::kFull ? H::kRowsChunks : H::kColumnsChunks;
    PYTRAIN_SHARED(Chunk, v_tile, kValues);  // 16-bit: transposed
    Chunk* const v_rows = H::kOneRoom ? k_rows : v_tile;
    PYTRAIN_SHARED(float, room, kThreads);
    const std::int64_t pair = block_row(), group = attention.heads / attention.kv_heads;
    const HeadPlace place{pair / attention.heads, pair % attention.heads, pair % attention.heads / group};
    // The last blocks see the most keys: they go first.
    const std::int64_t block_query = (block_count() - 1 - block_index()) * kBlockRows;
    const std::int64_t wave_query = block_query + wave_index() * kTileRows;
    const std::int64_t query = wave_query + lane_index() % 32;
    const bool exists = query < attention.query_rows;
    const std::int64_t begin = exists ? first_key(attention, place, query) : 0;
    const std::int64_t end = exists ? attention.query_offset + query + 1 : 0;
    const std::int64_t last_query = least(block_query + kBlockRows, attention.query_rows) - 1;
    const std::int64_t block_end = attention.query_offset + last_query + 1;

    const FragmentUpTo<format, depth, 208> q(query_rows(attention, place), query);
    TileCarrier<format, depth> keys(key_rows(attention, place, attention.k, block_end));
    // Of 160, a second wave on the SIMD is worth more.
    TileCarrier<format, depth, H::kAhead && depth != 160> values(key_rows(attention, place, attention.v, block_end));
    const float scale = score_scale(attention) * kLog2E;
    Sums sums[H::kBlocks] = {};
    float largest = -INFINITY, denominator = 0.0f;

    const std::int64_t wave_end = attention.query_offset + least(wave_query + kTileRows, attention.query_rows);
    std::int64_t key = least_first_key(attention, place, block_query, room) / kTileRows * kTileRows;
    const auto fetch = [&](std::int64_t at) {
        if (at >= block_end) return;
        keys.fetch(at);
        values.fetch(at);
    };
    const auto put_values = [&] { values.put(key, H::kFull ? v_rows : nullptr, v_rows); };
    fetch(key);
    for (; key < block_end; key += kTileRows) {
        barrier();  // the tile before has been read
        keys.put(key, k_rows, nullptr);
        if (!H::kOneRoom) put_values();
        barrier();
        fetch(key + kTileRows);
        keep_order();  // the loads have the whole of the products to arrive
        const bool sees = wave_query < attention.query_rows && key < wave_end;  // the same in the whole wave
        Sums scores = {};
        if (sees) {
            scores = rows_times_fragment<format, depth>(k_rows, q);
            softmax_step(scores, sums, largest, denominator, scale, key, begin, end);
        }
        if constexpr (H::kOneRoom) {
            barrier();  // the keys have been read
            put_values();
            barrier();
        }
        if (sees) add_columns_times_sums<format, depth>(sums, v_rows, v_rows, scores);
    }
    if (wave_query >= attention.query_rows) return;
    denominator += shuffle_xor(denominator, 32);  // each half has summed its own keys
    if (!exists) return;
    store_columns<format, depth>(attention.out, out_element(attention, place, query), attention.head_size, sums,
                                 1.0f / denominator);
    if (attention.lse != nullptr && lane_index() < 32)
        attention.lse[statistic(attention, place, query)] = largest / kLog2E + logf(denominator);
}

template <Format format>
void launch_forward(const Attention& attention, hipStream_t queue) {
    const dim3 blocks(static_cast<unsigned>(ceil_div(attention.query_rows, kBlockRows)),
                      static_cast<unsigned>(attention.batch * attention.heads));
#define PYTRAIN_FORWARD(depth)                                                                                        \
    PYTRAIN_LAUNCH_FIRST((Head<format, depth>::kRowsBytes), (attention_forward_kernel<format, depth>), blocks, queue, \
                         attention)
    PYTRAIN_FOR_DEPTH(attention.head_size, PYTRAIN_FORWARD);
#undef PYTRAIN_FORWARD
}

void launch_attention_forward(const Attention& attention, hipStream_t queue) {
    if (attention.batch * attention.query_rows == 0) return;
    switch (attention.q.dtype) {
        case DType::bf16:
            return launch_forward<Format::bf16>(attention, queue);
        case DType::fp16:
            return launch_forward<Format::fp16>(attention, queue);
        case DType::fp32:
            return launch_forward<Format::fp32>(attention, queue);
    }
}

}  // namespace pytrain::hip
