// Attention forward: one task per sequence, head and tile of queries, which walks over the tiles of keys that its
// queries see and keeps, per query, the maximum so far, the sum of exponentials and the weighted sum of values.
//
// Tiles of keys begin at absolute multiples of their size, and a query's exponentials are summed over its visible keys
// of a tile alone; keys it does not see enter the products as exact zeros. So a query's result has the same bits
// whether it is computed with a whole sequence or alone, from a cache.
#include "cpu/attention.h"

#include <cmath>
#include <limits>

#include "core/check.h"
#include "cpu/attention_tiles.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

using std::int64_t;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A thread's scratch for one tile of queries.
struct ForwardScratch {
    ForwardScratch(const AttentionTiles& tiles, float* base) : room(base) {
        q_panels = room.take(tiles.query_panels() * tiles.query_panel());
        k_panels = room.take(tiles.key_panels() * tiles.key_panel());
        v_panels = room.take(tiles.depth_panels() * tiles.value_panel());
        scores = room.take(tiles.panel_rows * tiles.keys);
        weights = room.take(tiles.panel(tiles.keys, tiles.panel_rows));
        sums = room.take(tiles.queries * tiles.padded);
        maximum = room.take(tiles.queries);
        denominator = room.take(tiles.queries);
    }

    Scratch room;
    float *q_panels, *k_panels, *v_panels;
    float* scores;       // (panel_rows, keys)
    float* weights;      // the same after exp, packed
    float* sums;         // (queries, padded head size): sum over keys of weight * value
    float* maximum;      // (queries): the largest score so far, unscaled
    float* denominator;  // (queries): the sum of weights so far
};

struct ForwardTask {
    ForwardTask(const Kernels& table, const AttentionTiles& cut, const AttentionHead& which, float* base)
        : kernels(table), tiles(cut), head(which), scratch(cut, base), scale(score_scale(which.attention)) {}

    const Kernels& kernels;
    const AttentionTiles& tiles;
    const AttentionHead& head;
    const ForwardScratch scratch;
    const float scale;
    int64_t query = 0, queries = 0;  // the tile
    int64_t key = 0, keys = 0;       // the tile

    // scores (n) of query `row` of the tile become weights; what is known of it so far is scaled to the new maximum.
    void softmax_row(float* scores, int64_t n, int64_t row) const {
        float& maximum = scratch.maximum[row];
        float& denominator = scratch.denominator[row];
        const float largest = kernels.maximum(scores, n);
        if (largest > maximum) {
            if (denominator > 0.0f) {
                float factor;
                kernels.exp_sum(&factor, &maximum, scale, scale * largest, 1);
                kernels.scale(scratch.sums + row * tiles.padded, factor, tiles.depth);
                denominator *= factor;
            }
            maximum = largest;
        }
        denominator += kernels.exp_sum(scores, scores, scale, scale * maximum, n);
    }

    // Queries [row, row + rows) of the tile, one panel, with the tile of keys.
    void step(int64_t row, int64_t rows) const {
        const int64_t begin = query + row, end = begin + rows;
        const int64_t visible = std::min(keys, head.end_key(end - 1) - key);
        if (visible <= 0 || head.first_key(begin, end) >= key + keys) return;
        const float* q_panel = scratch.q_panels + row / tiles.panel_rows * tiles.query_panel();
        for (int64_t column = 0; column < visible; column += tiles.panel_columns)
            tiles.multiply(tiles.depth, q_panel, scratch.k_panels + column / tiles.panel_columns * tiles.key_panel(),
                           scratch.scores + column, tiles.keys, false);
        for (int64_t i = 0; i < rows; ++i) {
            float* scores = scratch.scores + i * tiles.keys;
            const int64_t first = std::clamp<int64_t>(head.first_key(begin + i) - key, 0, visible);
            const int64_t last = std::clamp<int64_t>(head.end_key(begin + i) - key, first, visible);
            if (first < last) softmax_row(scores + first, last - first, row + i);
            std::fill(scores, scores + first, 0.0f);
            std::fill(scores + last, scores + visible, 0.0f);
        }
        tiles.products.pack_along[static_cast<int>(DType::fp32)](scratch.weights, scratch.scores, tiles.keys, visible,
                                                                 rows, tiles.panel_rows);
        for (int64_t panel = 0; panel < tiles.depth_panels(); ++panel)
            tiles.multiply(visible, scratch.weights, scratch.v_panels + panel * tiles.value_panel(),
                           scratch.sums + row * tiles.padded + panel * tiles.panel_columns, tiles.padded, true);
    }

    // out = sums / denominator, lse = log of the denominator at its true scale.
    void finish() const {
        const Attention& attention = head.attention;
        for (int64_t i = 0; i < queries; ++i) {
            float* sum = scratch.sums + i * tiles.padded;
            const Tensor out = head.out_row(attention.out, query + i);
            kernels.scale(sum, 1.0f / scratch.denominator[i], tiles.depth);
            kernels.narrow[static_cast<int>(out.dtype)](out.data, sum, tiles.depth);
            if (attention.lse)
                attention.lse[head.statistic(query + i)] =
                    scale * scratch.maximum[i] + std::log(scratch.denominator[i]);
        }
    }

    void run(int64_t first_query) {
        const Attention& attention = head.attention;
        query = first_query;
        queries = std::min(tiles.queries, attention.query_rows - query);
        std::fill(scratch.sums, scratch.sums + tiles.queries * tiles.padded, 0.0f);
        std::fill(scratch.maximum, scratch.maximum + queries, -kInfinity);
        std::fill(scratch.denominator, scratch.denominator + queries, 0.0f);
        pack_rows(tiles.products, scratch.q_panels, head.query_row(attention.q, query), attention.q_stride, queries,
                  tiles.panel_rows, tiles.depth, tiles.query_panel());
        const int64_t end = head.end_key(query + queries - 1);
        for (key = head.first_key(query, query + queries) / tiles.keys * tiles.keys; key < end; key += tiles.keys) {
            keys = std::min(tiles.keys, end - key);
            pack_rows(tiles.products, scratch.k_panels, head.key_row(attention.k, key), attention.kv_stride, keys,
                      tiles.panel_columns, tiles.depth, tiles.key_panel());
            pack_columns(tiles.products, scratch.v_panels, head.key_row(attention.v, key), attention.kv_stride, keys,
                         tiles.panel_columns, tiles.depth, tiles.value_panel());
            for (int64_t row = 0; row < queries; row += tiles.panel_rows)
                step(row, std::min(tiles.panel_rows, queries - row));
        }
        finish();
    }
};

}  // namespace

float score_scale(const Attention& attention) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(attention.head_size)));
}

void check_attention(const Attention& attention, const char* operation) {
    check(attention.kv_heads > 0 && attention.heads % attention.kv_heads == 0, operation, ": heads (", attention.heads,
          ") must be a multiple of kv_heads (", attention.kv_heads, ")");
    check(attention.head_size > 0, operation, ": head_size must be positive, not ", attention.head_size);
    check(attention.q.dtype == attention.k.dtype && attention.k.dtype == attention.v.dtype, operation,
          ": q, k and v must have one type");
    check(attention.query_offset >= 0 && attention.query_offset + attention.query_rows <= attention.key_rows, operation,
          ": ", attention.query_rows, " query rows at offset ", attention.query_offset,
          " need as many keys, but there are ", attention.key_rows, " key rows");
}

int64_t forward_floats(const AttentionTiles& tiles) { return ForwardScratch(tiles, nullptr).room.used(); }

void attention_forward(const Kernels& kernels, Workspace& workspace, const Attention& attention) {
    check_attention(attention, "attention_forward");
    workspace.require(attention_workspace(kernels, attention.head_size), "attention_forward");
    const AttentionTiles tiles(attention_products(kernels, attention), attention.head_size);
    const int64_t pairs = attention.batch * attention.heads;
    const int64_t query_tiles = (attention.query_rows + tiles.queries - 1) / tiles.queries;
    // The last tiles see the most keys: they go first, so that no thread is left with a long one at the end.
    parallel_for(workspace.threads(), pairs * query_tiles, [&](int64_t task, int thread) {
        const int64_t pair = task % pairs, tile = query_tiles - 1 - task / pairs;
        const AttentionHead head(attention, pair / attention.heads, pair % attention.heads);
        ForwardTask(kernels, tiles, head, workspace.thread(thread)).run(tile * tiles.queries);
    });
}

}  // namespace pytrain::cpu
