// Attention forward of few queries, as decoding asks for one at a time: queries are the rows of the products, so that a
// tile of scores has tile_rows queries rather than tile_columns, and keys and values are packed as right operands.
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

}  // namespace

int64_t few_queries_floats(const AttentionTiles& tiles) { return FewScratch(tiles, nullptr).room.used(); }

void attend_few_queries(const Kernels& kernels, const AttentionTiles& tiles, const AttentionHead& head, int64_t begin,
                        int64_t end, float* base) {
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
