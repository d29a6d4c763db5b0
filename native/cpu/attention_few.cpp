// Attention forward of few queries, as decoding asks for one at a time: queries are the rows of the products, so that a
// tile of scores has tile_rows queries rather than tile_columns, and keys and values are packed as right operands. A
// query alone takes no tile at all.
// Products add in the same order either way, and the softmax is that of attention.cpp on the transposed scores: a query
// has the bits that it has within a whole sequence.
#include <cmath>

#include "cpu/attention_tiles.h"

namespace pytrain::cpu {

using std::int64_t;

namespace {

struct FewScratch {
    FewScratch(const AttentionTiles& tiles, float* base) : room(base) {
        stride = ceil_to(tiles.forward_keys, tiles.panel_columns);
        v_panel = tiles.panel(tiles.forward_keys, tiles.panel_columns);
        q_panel = room.take(tiles.query_panel());
        k_panels = room.take(stride / tiles.panel_columns * tiles.key_panel());
        v_panels = room.take(tiles.depth_panels() * v_panel);
        rows = room.take(tiles.panel_rows * stride);
        width = std::max(tiles.panel_rows, tiles.panel_columns / 2);
        columns = room.take(tiles.forward_keys * width);
        weights = room.take(tiles.panel(tiles.forward_keys, tiles.panel_rows));
        sums = room.take(tiles.panel_rows * tiles.padded);
        maximum = room.take(width);
        denominator = room.take(width);
        factor = room.take(width);
    }

    Scratch room;
    int64_t stride, v_panel;  // of `rows`; floats of a panel of v
    int64_t width;            // of `columns`: half a tile is a whole vector where a tile has two
    float *q_panel, *k_panels, *v_panels;
    float* rows;                            // scores (tile_rows, stride)
    float* columns;                         // scores, then weights (forward_keys, width)
    float* weights;                         // packed as a left operand
    float* sums;                            // (tile_rows, padded head size)
    float *maximum, *denominator, *factor;  // (width)
};

// Carries on the softmax and the sums of the queries with keys [key, key + visible).
void add_keys(const Kernels& kernels, const AttentionTiles& tiles, const AttentionHead& head, const FewScratch& scratch,
              int64_t begin, int64_t queries, int64_t key, int64_t visible) {
    const Attention& attention = head.attention;
    const int64_t width = tiles.panel_columns;
    constexpr auto fp32 = static_cast<int>(DType::fp32);
    pack_rows(tiles.products, scratch.k_panels, head.key_row(attention.k, key), attention.kv_stride, visible, width,
              tiles.depth, tiles.key_panel());
    for (int64_t column = 0; column < visible; column += width)
        tiles.multiply(tiles.depth, scratch.q_panel, scratch.k_panels + column / width * tiles.key_panel(),
                       scratch.rows + column, scratch.stride, false);
    kernels.pack_along[fp32](scratch.columns, scratch.rows, scratch.stride, visible, queries,
                             scratch.width);  // transposes
    hide_unseen(head, scratch.columns, scratch.width, begin, queries, key, visible);
    const bool changed = kernels.softmax_columns(scratch.columns, scratch.maximum, scratch.denominator, scratch.factor,
                                                 score_scale(attention), visible, scratch.width);
    if (changed)
        for (int64_t i = 0; i < queries; ++i)
            kernels.scale(scratch.sums + i * tiles.padded, scratch.factor[i], tiles.depth);
    tiles.products.pack_across[fp32](scratch.weights, scratch.columns, scratch.width, visible, queries,
                                     tiles.panel_rows);
    pack_columns(tiles.products, scratch.v_panels, head.key_row(attention.v, key), attention.kv_stride, visible, width,
                 tiles.depth, scratch.v_panel);
    for (int64_t panel = 0; panel < tiles.depth_panels(); ++panel)
        tiles.multiply(visible, scratch.weights, scratch.v_panels + panel * scratch.v_panel,
                       scratch.sums + panel * width, tiles.padded, true);
}

// A query alone is one row of a product rather than one of a whole tile's, and its softmax runs along the keys. What is
// left is mostly reading and packing keys and values, each of which is used once.
struct OneScratch {
    OneScratch(const AttentionTiles& tiles, float* base) : room(base) {
        const int64_t stride = ceil_to(tiles.forward_keys, tiles.panel_columns);
        v_panel = tiles.panel(tiles.forward_keys, tiles.panel_columns);
        q = room.take(tiles.panel(tiles.depth, 1));
        k_panels = room.take(stride / tiles.panel_columns * tiles.key_panel());
        v_panels = room.take(tiles.depth_panels() * v_panel);
        scores = room.take(stride);
        weights = tiles.products.word_depth > 1 ? room.take(tiles.panel(tiles.forward_keys, 1)) : scores;
        sums = room.take(tiles.padded);
    }

    Scratch room;
    int64_t v_panel;                 // floats
    float *q, *k_panels, *v_panels;  // q: a panel of one row
    float *scores, *weights;         // (forward_keys) each; weights as q
    float* sums;                     // (padded head size)
};

// The softmax of a query so far.
struct OneStatistics {
    float maximum = kNoScore, denominator = 0.0f;
};

// Carries on the softmax and the sums of query `row` with keys [key, key + visible).
void add_keys_to_one(const Kernels& kernels, const AttentionTiles& tiles, const AttentionHead& head,
                     const OneScratch& scratch, OneStatistics& so_far, int64_t row, int64_t key, int64_t visible) {
    const Attention& attention = head.attention;
    const int64_t width = tiles.panel_columns;
    constexpr auto fp32 = static_cast<int>(DType::fp32);
    pack_rows(tiles.products, scratch.k_panels, head.key_row(attention.k, key), attention.kv_stride, visible, width,
              tiles.depth, tiles.key_panel());
    tiles.products.matmul_row(tiles.products.words(tiles.depth), scratch.q, scratch.k_panels, width, tiles.key_panel(),
                              ceil_to(visible, width) / width, scratch.scores, false);
    hide_unseen(head, scratch.scores, 1, row, 1, key, visible);
    float factor;
    if (kernels.softmax_row(scratch.scores, &so_far.maximum, &so_far.denominator, &factor, score_scale(attention),
                            visible))
        kernels.scale(scratch.sums, factor, tiles.depth);
    if (scratch.weights != scratch.scores)
        tiles.products.pack_along[fp32](scratch.weights, scratch.scores, visible, visible, 1, 1);
    const Tensor values = head.key_row(attention.v, key);
    if (values.dtype == DType::fp32 && tiles.products.word_depth == 1 && tiles.padded == tiles.depth) {
        // Rows of values are what their panels would hold.
        tiles.products.matmul_row(visible, scratch.weights, static_cast<const float*>(values.data), attention.kv_stride,
                                  width, tiles.depth_panels(), scratch.sums, true);
        return;
    }
    pack_columns(tiles.products, scratch.v_panels, values, attention.kv_stride, visible, width, tiles.depth,
                 scratch.v_panel);
    tiles.products.matmul_row(tiles.products.words(visible), scratch.weights, scratch.v_panels, width, scratch.v_panel,
                              tiles.depth_panels(), scratch.sums, true);
}

void attend_one_query(const Kernels& kernels, const AttentionTiles& tiles, const AttentionHead& head, int64_t row,
                      float* base) {
    const Attention& attention = head.attention;
    const OneScratch scratch(tiles, base);
    const int64_t end_key = head.end_key(row);
    OneStatistics statistics;
    std::fill_n(scratch.sums, tiles.padded, 0.0f);
    pack_rows(tiles.products, scratch.q, head.query_row(attention.q, row), attention.q_stride, 1, 1, tiles.depth,
              tiles.panel(tiles.depth, 1));
    for (int64_t key = head.first_key(row) / tiles.forward_keys * tiles.forward_keys; key < end_key;
         key += tiles.forward_keys)
        add_keys_to_one(kernels, tiles, head, scratch, statistics, row, key,
                        std::min(tiles.forward_keys, end_key - key));
    const Tensor out = head.out_row(attention.out, row);
    kernels.scale(scratch.sums, 1.0f / statistics.denominator, tiles.depth);
    kernels.narrow[static_cast<int>(out.dtype)](out.data, scratch.sums, tiles.depth);
    if (attention.lse)
        attention.lse[head.statistic(row)] =
            score_scale(attention) * statistics.maximum + std::log(statistics.denominator);
}

}  // namespace

int64_t few_queries_floats(const AttentionTiles& tiles) {
    return std::max(FewScratch(tiles, nullptr).room.used(), OneScratch(tiles, nullptr).room.used());
}

void attend_few_queries(const Kernels& kernels, const AttentionTiles& tiles, const AttentionHead& head, int64_t begin,
                        int64_t end, float* base) {
    if (end - begin == 1 && tiles.products.matmul_row != nullptr) {
        attend_one_query(kernels, tiles, head, begin, base);
        return;
    }
    const Attention& attention = head.attention;
    const FewScratch scratch(tiles, base);
    const int64_t queries = end - begin, end_key = head.end_key(end - 1);
    std::fill_n(scratch.sums, tiles.panel_rows * tiles.padded, 0.0f);
    std::fill_n(scratch.maximum, scratch.width, kNoScore);
    std::fill_n(scratch.denominator, scratch.width, 0.0f);
    pack_rows(tiles.products, scratch.q_panel, head.query_row(attention.q, begin), attention.q_stride, queries,
              tiles.panel_rows, tiles.depth, tiles.query_panel());
    for (int64_t key = head.first_key(begin, end) / tiles.forward_keys * tiles.forward_keys; key < end_key;
         key += tiles.forward_keys)
        add_keys(kernels, tiles, head, scratch, begin, queries, key, std::min(tiles.forward_keys, end_key - key));
    for (int64_t i = 0; i < queries; ++i) {
        float* const sum = scratch.sums + i * tiles.padded;
        const Tensor out = head.out_row(attention.out, begin + i);
        kernels.scale(sum, 1.0f / scratch.denominator[i], tiles.depth);
        kernels.narrow[static_cast<int>(out.dtype)](out.data, sum, tiles.depth);
        if (attention.lse)
            attention.lse[head.statistic(begin + i)] =
                score_scale(attention) * scratch.maximum[i] + std::log(scratch.denominator[i]);
    }
}

}  // namespace pytrain::cpu
