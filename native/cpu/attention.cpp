// Attention forward: one task per sequence, head and tile of queries, which walks over the tiles of keys that its
// queries see and keeps, per query, the maximum so far, the sum of exponentials and the weighted sum of values.
//
// Tiles of keys begin at absolute multiples of their size, and a query has a column, and so a lane, of its own: keys it
// does not see have exact zeros there, and a tile that it does not see at all scales what it has by exactly one. So a
// query's result has the same bits whether it is computed with a whole sequence or alone, from a cache.
#include "cpu/attention.h"

#include <cmath>

#include "core/check.h"
#include "cpu/attention_tiles.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

using std::int64_t;

namespace {

// Tiles of queries are made smaller until each thread has this many tasks.
constexpr int64_t kTasksPerThread = 4;

// A thread's scratch for one tile of queries. A group is tile_columns of them.
struct ForwardScratch {
    ForwardScratch(const AttentionTiles& tiles, float* base) : room(base) {
        const int64_t groups = tiles.forward_queries / tiles.panel_columns;
        q_panels = room.take(groups * tiles.key_panel());
        k_panels = room.take(tiles.forward_keys / tiles.panel_rows * tiles.query_panel());
        v_panels = room.take(tiles.depth_rows / tiles.panel_rows * tiles.left_value_panel());
        scores = room.take(tiles.forward_keys * tiles.panel_columns);
        weights =
            tiles.products.word_depth > 1 ? room.take(tiles.panel(tiles.forward_keys, tiles.panel_columns)) : scores;
        sums = room.take(groups * tiles.depth_rows * tiles.panel_columns);
        out_rows = room.take(tiles.panel_columns * tiles.depth);
        maximum = room.take(tiles.forward_queries);
        denominator = room.take(tiles.forward_queries);
        factor = room.take(tiles.panel_columns);
    }

    Scratch room;
    float *q_panels, *k_panels, *v_panels;
    float* scores;       // (forward_keys, group)
    float* weights;      // the same after exp, as a right operand: scores themselves where a word is a float
    float* sums;         // (groups, depth_rows, group): sum over keys of weight * value
    float* out_rows;     // (group, head size)
    float* maximum;      // (forward_queries): the largest score so far, unscaled
    float* denominator;  // (forward_queries): the sum of weights so far
    float* factor;       // (group)
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

    int64_t sums_floats() const { return tiles.depth_rows * tiles.panel_columns; }

    // Queries [row, row + rows) of the tile, one group, with the tile of keys.
    void step(int64_t row, int64_t rows) const {
        const int64_t begin = query + row, end = begin + rows, width = tiles.panel_columns;
        const int64_t visible = std::min(keys, head.end_key(end - 1) - key);
        if (visible <= 0 || head.first_key(begin, end) >= key + keys) return;
        const float* q_panel = scratch.q_panels + row / width * tiles.key_panel();
        float* const sums = scratch.sums + row / width * sums_floats();
        for (int64_t k = 0; k < visible; k += tiles.panel_rows)
            tiles.multiply(tiles.depth, scratch.k_panels + k / tiles.panel_rows * tiles.query_panel(), q_panel,
                           scratch.scores + k * width, width, false);
        hide_unseen(head, scratch.scores, width, begin, rows, key, visible);
        const bool changed = kernels.softmax_columns(scratch.scores, scratch.maximum + row, scratch.denominator + row,
                                                     scratch.factor, scale, visible, width);
        if (changed) kernels.scale_columns(sums, scratch.factor, tiles.depth_rows, width);
        if (scratch.weights != scratch.scores)
            tiles.products.pack_across[static_cast<int>(DType::fp32)](scratch.weights, scratch.scores, width, visible,
                                                                      width, width);
        for (int64_t panel = 0; panel * tiles.panel_rows < tiles.depth; ++panel)
            tiles.multiply(visible, scratch.v_panels + panel * tiles.left_value_panel(), scratch.weights,
                           sums + panel * tiles.panel_rows * width, width, true);
    }

    // out = sums / denominator, lse = log of the denominator at its true scale, of one group.
    void finish(int64_t row, int64_t rows) const {
        const Attention& attention = head.attention;
        const int64_t width = tiles.panel_columns;
        float* const sums = scratch.sums + row / width * sums_floats();
        const float* const denominator = scratch.denominator + row;
        for (int64_t i = 0; i < width; ++i) scratch.factor[i] = 1.0f / denominator[i];
        kernels.scale_columns(sums, scratch.factor, tiles.depth_rows, width);
        // Packing one panel as wide as the head transposes.
        kernels.pack_along[static_cast<int>(DType::fp32)](scratch.out_rows, sums, width, rows, tiles.depth,
                                                          tiles.depth);
        for (int64_t i = 0; i < rows; ++i) {
            const Tensor out = head.out_row(attention.out, query + row + i);
            kernels.narrow[static_cast<int>(out.dtype)](out.data, scratch.out_rows + i * tiles.depth, tiles.depth);
            if (attention.lse)
                attention.lse[head.statistic(query + row + i)] =
                    scale * scratch.maximum[row + i] + std::log(denominator[i]);
        }
    }

    template <class Body>
    void for_groups(const Body& body) const {
        for (int64_t row = 0; row < queries; row += tiles.panel_columns)
            body(row, std::min(tiles.panel_columns, queries - row));
    }

    // Queries [begin, end): at most forward_queries.
    void run(int64_t begin, int64_t end_query) {
        const Attention& attention = head.attention;
        query = begin;
        queries = end_query - begin;
        const int64_t padded = ceil_to(queries, tiles.panel_columns);
        std::fill(scratch.sums, scratch.sums + padded * tiles.depth_rows, 0.0f);
        std::fill(scratch.maximum, scratch.maximum + padded, kNoScore);
        std::fill(scratch.denominator, scratch.denominator + padded, 0.0f);
        pack_rows(tiles.products, scratch.q_panels, head.query_row(attention.q, query), attention.q_stride, queries,
                  tiles.panel_columns, tiles.depth, tiles.key_panel());
        const int64_t end = head.end_key(query + queries - 1);
        for (key = head.first_key(query, query + queries) / tiles.forward_keys * tiles.forward_keys; key < end;
             key += tiles.forward_keys) {
            keys = std::min(tiles.forward_keys, end - key);
            pack_rows(tiles.products, scratch.k_panels, head.key_row(attention.k, key), attention.kv_stride, keys,
                      tiles.panel_rows, tiles.depth, tiles.query_panel());
            pack_columns(tiles.products, scratch.v_panels, head.key_row(attention.v, key), attention.kv_stride, keys,
                         tiles.panel_rows, tiles.depth, tiles.left_value_panel());
            for_groups([&](int64_t row, int64_t rows) { step(row, rows); });
        }
        for_groups([&](int64_t row, int64_t rows) { finish(row, rows); });
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

int64_t forward_floats(const AttentionTiles& tiles) {
    return std::max(ForwardScratch(tiles, nullptr).room.used(), few_queries_floats(tiles));
}

void attention_forward(const Kernels& kernels, Workspace& workspace, const Attention& attention) {
    check_attention(attention, "attention_forward");
    workspace.require(attention_workspace(kernels, attention.head_size), "attention_forward");
    const AttentionTiles tiles(attention_products(kernels, attention), attention.head_size);
    const int64_t pairs = attention.batch * attention.heads;
    // Neither the size of a tile of queries nor the order of tasks touches a result: both may know the threads.
    int64_t queries = tiles.forward_queries;
    const auto tiles_of_queries = [&] { return (attention.query_rows + queries - 1) / queries; };
    while (pairs * tiles_of_queries() < kTasksPerThread * workspace.threads() && queries > tiles.panel_columns)
        queries = ceil_to(queries / 2, tiles.panel_columns);
    const int64_t cuts = tiles_of_queries();
    queries = ceil_to((attention.query_rows + cuts - 1) / cuts, tiles.panel_columns);
    // The last tiles see the most keys: they go first, so that no thread is left with a long one at the end. Where
    // there are many heads, one after the other, so that its keys and values stay in a cache.
    const bool head_by_head = pairs >= kTasksPerThread * workspace.threads();
    parallel_for(workspace.threads(), pairs * cuts, [&](int64_t task, int thread) {
        const int64_t pair = head_by_head ? task / cuts : task % pairs;
        const int64_t begin = (cuts - 1 - (head_by_head ? task % cuts : task / pairs)) * queries;
        const int64_t end = std::min(begin + queries, attention.query_rows);
        const AttentionHead head(attention, pair / attention.heads, pair % attention.heads);
        // A last group of few queries would fill little of its columns.
        const int64_t rest = (end - begin) % tiles.panel_columns;
        const int64_t middle = rest <= tiles.panel_rows ? end - rest : end;
        if (begin < middle) ForwardTask(kernels, tiles, head, workspace.thread(thread)).run(begin, middle);
        if (middle < end) attend_few_queries(kernels, tiles, head, middle, end, workspace.thread(thread));
    });
}

}  // namespace pytrain::cpu
