// Attention forward on the matrix units. A block takes 128 queries of one head, each of its four waves 32; tiles of 32
// keys and values go through LDS. The matrix of scores never exists (Dao et al., "FlashAttention", 2022).
//
// FLOPs 4 head_size per visible pair, of which the causal edge wastes at most 31 keys per query; bytes: q and out once,
// k and v once per 128 queries. The matrix units bind from about 100 keys on.
#include "hip/attention_tiles.h"
#include "hip/kernels.h"

namespace pytrain::hip {

// What is known of this lane's query after some tiles: the weighted sum of values, the largest score (in base-2
// logarithms; it agrees in both halves of the wave), and the sum of weights, of which each half has its own keys'.
template <Format format, int depth>
struct OnlineSoftmax {
    using H = Head<format, depth>;
    Sums sums[H::kBlocks] = {};
    float largest = -INFINITY, denominator = 0.0f;

    // Scores (keys of the tile x 32 queries) become weights; what is known so far is scaled to the new maximum.
    PYTRAIN_INLINE void step(Sums& scores, float scale, std::int64_t key, const QueryBlock& block) {
        float highest = -INFINITY;
        PYTRAIN_UNROLL
        for (int g = 0; g < 16; ++g) {
            const std::int64_t at = key + 8 * (g / 4) + 4 * (lane_index() / 32) + g % 4;
            scores[g] = at >= block.begin && at < block.end ? scores[g] * scale : -INFINITY;
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
        for (int i = 0; i < H::kBlocks; ++i) sums[i] *= factor;
    }

    // The query's row of out, and its log-sum-exp.
    PYTRAIN_INLINE void write(const Attention& attention, const QueryBlock& block) {
        if (block.wave_first >= block.rows) return;
        denominator += shuffle_xor(denominator, 32);
        if (!block.exists) return;
        store_columns<format, depth>(attention.out, out_element(attention, block.place, block.query),
                                     attention.head_size, sums, 1.0f / denominator);
        if (attention.lse != nullptr && lane_index() < 32)
            attention.lse[statistic(attention, block.place, block.query)] = largest / kLog2E + logf(denominator);
    }
};

template <Format format, int depth>
PYTRAIN_KERNEL PYTRAIN_WAVES((format == Format::fp32 ? depth <= 64 : depth <= 160) ? 2 : 1)
    attention_forward_kernel(Attention attention) {
    using H = Head<format, depth>;
    PYTRAIN_SHARED_FIRST(Chunk, k_rows, H::kRowsChunks);
    constexpr int kValues = H::kOneRoom ? 1 : H::kFull ? H::kRowsChunks : H::kColumnsChunks;
    PYTRAIN_SHARED(Chunk, v_tile, kValues);  // 16-bit: transposed
    Chunk* const v_rows = H::kOneRoom ? k_rows : v_tile;
    PYTRAIN_SHARED(float, room, kThreads);
    const QueryBlock block(attention);
    const FragmentUpTo<format, depth, 208> q(query_rows(attention, block.place), block.query);
    TileCarrier<format, depth> keys(key_rows(attention, block.place, attention.k, block.block_end));
    // Of 160, a second wave on the SIMD is worth more.
    TileCarrier<format, depth, H::kAhead && depth != 160> values(
        key_rows(attention, block.place, attention.v, block.block_end));
    const float scale = score_scale(attention) * kLog2E;
    OnlineSoftmax<format, depth> softmax;

    std::int64_t key = first_tile(attention, block, room);
    fetch_tiles(keys, values, key, block);
    for (; key < block.block_end; key += kTileRows) {
        barrier();  // the tile before has been read
        keys.put(key, k_rows, nullptr);
        if (!H::kOneRoom) values.put(key, H::kFull ? v_rows : nullptr, v_rows);
        barrier();
        fetch_tiles(keys, values, key + kTileRows, block);
        keep_order();  // the loads have the whole of the products to arrive
        const bool sees = block.wave_sees(key);
        Sums scores = {};
        if (sees) {
            scores = rows_times_fragment<format, depth>(k_rows, q);
            softmax.step(scores, scale, key, block);
        }
        if constexpr (H::kOneRoom) {
            barrier();  // the keys have been read
            values.put(key, H::kFull ? v_rows : nullptr, v_rows);
            barrier();
        }
        if (sees) add_columns_times_sums<format, depth>(softmax.sums, v_rows, v_rows, scores);
    }
    softmax.write(attention, block);
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
