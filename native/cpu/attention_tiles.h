// What attention forward and backward share: how work is cut into tiles, which keys a query sees, and packing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/attention.h"

namespace pytrain::cpu {

constexpr std::int64_t kPanelAlignment = 16;  // floats: the 64 bytes that kernels.h promises of panels

inline std::int64_t ceil_to(std::int64_t a, std::int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

// Elements of the queries that share packed keys and values in the forward pass: with their sums, 400 KiB.
constexpr std::int64_t kForwardFloats = 768 * 64;

// Sizes of tiles, from the table and the head size alone.
//
// Backward, a tile of queries is about 100 rows, so that a packed key or value meets 100 multiply-adds; its query rows
// go through the products one panel of tile_rows at a time, so that the causal edge wastes little. A tile of keys is
// 256, since each meets the packing of all queries: with a head size of 64, keys and values packed are 64 KiB each, and
// everything a task holds is within a second-level cache of 1 MiB.
//
// Forward, scores have keys as rows and queries as columns: they are the right operand of the next product as they are,
// and a softmax runs down the lanes. So queries go by groups of tile_columns, and as a group takes little room, up to
// forward_queries of them share what is packed of keys and values. A tile of keys is 128, whose scores (16 KiB with 32
// columns) stay in the first-level cache from product to softmax to product.
struct AttentionTiles {
    AttentionTiles(const Products& table, std::int64_t head_size)
        : products(table),
          panel_rows(table.tile_rows),
          panel_columns(table.tile_columns),
          depth(head_size),
          padded(ceil_to(head_size, table.tile_columns)),
          queries(ceil_to(96, table.tile_rows)),
          keys(ceil_to(256, table.tile_columns)),
          key_rows(keys / table.tile_rows * table.tile_rows),
          depth_rows(ceil_to(head_size, table.tile_rows)),
          forward_queries(ceil_to(std::clamp<std::int64_t>(kForwardFloats / head_size, 96, 768), table.tile_columns)),
          forward_keys(128 / table.tile_rows * table.tile_rows) {}

    std::int64_t panel(std::int64_t k, std::int64_t width) const {
        return ceil_to(products.words(k) * width, kPanelAlignment);
    }
    void multiply(std::int64_t k, const float* a, const float* b, float* c, std::int64_t ldc, bool accumulate) const {
        products.matmul_tile(products.words(k), a, b, c, ldc, accumulate);
    }
    std::int64_t query_panel() const { return panel(depth, panel_rows); }    // q or dout, left operand
    std::int64_t key_panel() const { return panel(depth, panel_columns); }   // k or v, right operand of scores
    std::int64_t value_panel() const { return panel(keys, panel_columns); }  // v or k, right operand of sums over keys
    std::int64_t left_value_panel() const { return panel(forward_keys, panel_rows); }  // v, left operand of those
    std::int64_t row_panel() const {
        return panel(queries, panel_columns);
    }  // q or dout, right operand of sums over queries
    std::int64_t query_panels() const { return queries / panel_rows; }
    std::int64_t key_panels() const { return keys / panel_columns; }
    std::int64_t depth_panels() const { return padded / panel_columns; }

    const Products products;
    std::int64_t panel_rows, panel_columns;
    std::int64_t depth, padded;    // head size, and rounded up to whole tiles
    std::int64_t queries, keys;    // per tile
    std::int64_t key_rows;         // keys per tile where keys are the rows of a product: whole panels, at most `keys`
    std::int64_t depth_rows;       // head size where it is the rows of a product: rounded up to whole panels
    std::int64_t forward_queries;  // per tile of the forward pass, at most
    std::int64_t forward_keys;     // per tile of the forward pass, whole panels
};

// Takes consecutive pieces from a thread's scratch; with a null base it only counts.
class Scratch {
public:
    explicit Scratch(float* base) : base_(base) {}
    float* take(std::int64_t floats) {
        float* piece = base_ ? base_ + used_ : nullptr;
        used_ += ceil_to(floats, kPanelAlignment);
        return piece;
    }
    std::int64_t used() const { return used_; }

private:
    float* base_;
    std::int64_t used_ = 0;
};

// One sequence and head of an attention: where its rows lie and what its queries see.
struct AttentionHead {
    AttentionHead(const Attention& all, std::int64_t sequence, std::int64_t head_index)
        : attention(all), batch(sequence), head(head_index), kv_head(head_index / (all.heads / all.kv_heads)) {}

    // Row i of a tensor laid out as q, as k (or v), and as out.
    Tensor query_row(const Tensor& x, std::int64_t i) const {
        return x.at(batch * attention.q_batch_stride + i * attention.q_stride + head * attention.head_size);
    }
    Tensor key_row(const Tensor& x, std::int64_t i) const {
        return x.at(batch * attention.kv_batch_stride + i * attention.kv_stride + kv_head * attention.head_size);
    }
    Tensor out_row(const Tensor& x, std::int64_t i) const {
        return x.at((batch * attention.query_rows + i) * out_stride() + head * attention.head_size);
    }
    std::int64_t out_stride() const { return attention.heads * attention.head_size; }
    // Of (batch, heads, query_rows) statistics.
    std::int64_t statistic(std::int64_t i) const { return (batch * attention.heads + head) * attention.query_rows + i; }

    // Query i sees keys [first_key(i), end_key(i)).
    std::int64_t first_key(std::int64_t i) const {
        return attention.document_starts ? attention.document_starts[batch * attention.query_rows + i] : 0;
    }
    std::int64_t end_key(std::int64_t i) const { return attention.query_offset + i + 1; }
    // The first key that any of the queries [begin, end) sees.
    std::int64_t first_key(std::int64_t begin, std::int64_t end) const {
        std::int64_t first = end_key(begin);
        for (std::int64_t i = begin; i < end; ++i) first = std::min(first, first_key(i));
        return first;
    }

    const Attention& attention;
    std::int64_t batch, head, kv_head;
};

// Packs `rows` rows of head_size elements (ld apart) as panels of `width` rows each, `stride` floats apart: an operand
// whose product runs over the head size.
inline void pack_rows(const Products& products, float* panels, const Tensor& source, std::int64_t ld, std::int64_t rows,
                      std::int64_t width, std::int64_t depth, std::int64_t stride) {
    const auto kernel = products.pack_along[static_cast<int>(source.dtype)];
    for (std::int64_t row = 0; row < rows; row += width)
        kernel(panels + row / width * stride, source.at(row * ld).data, ld, depth, std::min(width, rows - row), width);
}

// Rows that are packed as columns at a time: rows of several heads lie far apart and fall into few sets of a cache, so
// that their lines, which reach into several panels, would be gone before the next panel is packed.
constexpr std::int64_t kColumnRows = 16;

// Packs the same rows as panels of `width` columns of the head size: an operand whose product runs over the rows.
inline void pack_columns(const Products& products, float* panels, const Tensor& source, std::int64_t ld,
                         std::int64_t rows, std::int64_t width, std::int64_t depth, std::int64_t stride) {
    const auto kernel = products.pack_across[static_cast<int>(source.dtype)];
    for (std::int64_t row = 0; row < rows; row += kColumnRows)
        for (std::int64_t column = 0; column < depth; column += width)
            kernel(panels + column / width * stride + products.words(row) * width, source.at(row * ld + column).data,
                   ld, std::min(kColumnRows, rows - row), std::min(width, depth - column), width);
}

// How the products of an attention are made: all of them from bf16 where q, k and v (and dout) are. Weights and their
// gradients are then rounded to bf16 as they are packed; softmax and all sums stay fp32.
inline Products attention_products(const Kernels& kernels, const Attention& attention) {
    return kernels.products(attention.q.dtype, attention.k.dtype);
}

// Below every finite score, and finite, so that the difference to a score of -infinity (unseen) is not NaN.
constexpr float kNoScore = std::numeric_limits<float>::lowest();

// Scores of what queries [begin, begin + rows) do not see of keys [key, key + visible) become -infinity. scores
// (visible, width): a key per row, a query per column.
inline void hide_unseen(const AttentionHead& head, float* scores, std::int64_t width, std::int64_t begin,
                        std::int64_t rows, std::int64_t key, std::int64_t visible) {
    constexpr float unseen = -std::numeric_limits<float>::infinity();
    for (std::int64_t k = std::max<std::int64_t>(0, head.end_key(begin) - key); k < visible; ++k)
        std::fill_n(scores + k * width, std::min(rows, key + k + 1 - head.end_key(begin)), unseen);
    if (head.attention.document_starts == nullptr) return;
    for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t first = std::clamp<std::int64_t>(head.first_key(begin + i) - key, 0, visible);
        for (std::int64_t k = 0; k < first; ++k) scores[k * width + i] = unseen;
    }
}

// Attention forward of queries [begin, end) of a head, at most tile_rows of them: see attention_few.cpp.
void attend_few_queries(const Kernels& kernels, const AttentionTiles& tiles, const AttentionHead& head,
                        std::int64_t begin, std::int64_t end, float* scratch);
std::int64_t few_queries_floats(const AttentionTiles& tiles);

// Floats of a thread's scratch that the forward pass takes.
std::int64_t forward_floats(const AttentionTiles& tiles);

// Throws Error, naming the operation, where sizes do not fit together.
void check_attention(const Attention& attention, const char* operation);
float score_scale(const Attention& attention);  // 1/sqrt(head_size)

}  // namespace pytrain::cpu
