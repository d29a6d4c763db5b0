// Attention backward, in one of two ways that give the same bits.
//
// By tiles: two passes that each compute the weights again. One task per tile of queries sums dq over keys, then one
// task per tile of keys sums dk and dv over queries. Seven products per pair of tiles, scratch that depends on the head
// size alone, and as many tasks as there are tiles.
//
// By heads: one task per sequence and kv head walks over its tiles of keys and, for each, over its tiles of queries.
// Weights are computed once, five products; but dq of the whole sequence is summed in fp32 beside (in the workspace
// that products have anyway, for the heads under way), and there are no more tasks than heads. So this is for many
// heads and few threads.
//
// In both, every element has one writer and one order of addition: tiles of keys begin at multiples of key_rows, tiles
// of queries at multiples of their size, and both ascend.
#include <cmath>

#include "core/check.h"
#include "cpu/attention.h"
#include "cpu/attention_tiles.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

using std::int64_t;

namespace {

struct Gradients {
    Tensor dq, dk, dv, dout;
    float* delta;  // (batch, heads, query_rows): sum of dout * out
};

// What both passes need to compute weights and their gradients again. Queries are packed as rows, keys as columns.
struct ScoreScratch {
    ScoreScratch(const AttentionTiles& tiles, Scratch& room, int64_t rows) {
        q_panels = room.take(tiles.query_panels() * tiles.query_panel());
        dout_panels = room.take(tiles.query_panels() * tiles.query_panel());
        k_panels = room.take(tiles.key_panels() * tiles.key_panel());
        v_panels = room.take(tiles.key_panels() * tiles.key_panel());
        weights = room.take(rows * tiles.keys);
        dscores = room.take(rows * tiles.keys);
    }

    float *q_panels, *dout_panels, *k_panels, *v_panels;
    float* weights;  // (rows, keys)
    float* dscores;  // (rows, keys)
};

struct QueryScratch {
    QueryScratch(const AttentionTiles& tiles, float* base) : room(base), score(tiles, room, tiles.panel_rows) {
        k_columns = room.take(tiles.depth_panels() * tiles.value_panel());
        dscores = room.take(tiles.panel(tiles.keys, tiles.panel_rows));
        dq = room.take(tiles.queries * tiles.padded);
        out_row = room.take(tiles.depth);
        dout_row = room.take(tiles.depth);
    }

    Scratch room;
    ScoreScratch score;
    float* k_columns;
    float* dscores;  // packed
    float* dq;       // (queries, padded head size)
    float *out_row, *dout_row;
};

struct KeyScratch {
    KeyScratch(const AttentionTiles& tiles, float* base) : room(base), score(tiles, room, tiles.queries) {
        q_columns = room.take(tiles.depth_panels() * tiles.row_panel());
        dout_columns = room.take(tiles.depth_panels() * tiles.row_panel());
        transposed = room.take(tiles.panel(tiles.queries, tiles.panel_rows));
        dk = room.take(tiles.key_rows * tiles.padded);
        dv = room.take(tiles.key_rows * tiles.padded);
    }

    Scratch room;
    ScoreScratch score;
    float *q_columns, *dout_columns;
    float* transposed;  // weights or dscores with keys as rows, packed
    float *dk, *dv;     // (key_rows, padded head size)
};

// What a task that goes over whole heads has beside: keys as they enter dq, and dscores with queries as rows, packed.
struct HeadScratch {
    HeadScratch(const AttentionTiles& tiles, float* base) : keys(tiles, base) {
        k_columns = keys.room.take(tiles.depth_panels() * tiles.value_panel());
        dscores = keys.room.take(tiles.panel(tiles.keys, tiles.panel_rows));
        out_row = keys.room.take(tiles.depth);
        dout_row = keys.room.take(tiles.depth);
    }

    KeyScratch keys;
    float *k_columns, *dscores, *out_row, *dout_row;
};

struct Pass {
    const Kernels& kernels;
    const AttentionTiles tiles;
    const Attention& attention;
    const Gradients& gradients;
    const float scale;

    void pack_queries(const ScoreScratch& scratch, const AttentionHead& head, int64_t query, int64_t queries) const {
        pack_rows(tiles.products, scratch.q_panels, head.query_row(attention.q, query), attention.q_stride, queries,
                  tiles.panel_rows, tiles.depth, tiles.query_panel());
        pack_rows(tiles.products, scratch.dout_panels, head.out_row(gradients.dout, query), head.out_stride(), queries,
                  tiles.panel_rows, tiles.depth, tiles.query_panel());
    }

    void pack_keys(const ScoreScratch& scratch, const AttentionHead& head, int64_t key, int64_t keys) const {
        pack_rows(tiles.products, scratch.k_panels, head.key_row(attention.k, key), attention.kv_stride, keys,
                  tiles.panel_columns, tiles.depth, tiles.key_panel());
        pack_rows(tiles.products, scratch.v_panels, head.key_row(attention.v, key), attention.kv_stride, keys,
                  tiles.panel_columns, tiles.depth, tiles.key_panel());
    }

    // weights and dscores (rows, keys) of one panel of queries, from `begin` on, and the keys from `key` on; 0 where a
    // query does not see a key. `panel`: which packed panel the queries are.
    void score(const ScoreScratch& scratch, float* weights, float* dscores, const AttentionHead& head, int64_t panel,
               int64_t begin, int64_t rows, int64_t key, int64_t keys) const {
        const float* q_panel = scratch.q_panels + panel * tiles.query_panel();
        const float* dout_panel = scratch.dout_panels + panel * tiles.query_panel();
        const int64_t visible = std::clamp<int64_t>(head.end_key(begin + rows - 1) - key, 0, keys);
        for (int64_t column = 0; column < visible; column += tiles.panel_columns) {
            const int64_t offset = column / tiles.panel_columns * tiles.key_panel();
            tiles.multiply(tiles.depth, q_panel, scratch.k_panels + offset, weights + column, tiles.keys, false);
            tiles.multiply(tiles.depth, dout_panel, scratch.v_panels + offset, dscores + column, tiles.keys, false);
        }
        for (int64_t i = 0; i < rows; ++i) {
            float* p = weights + i * tiles.keys;
            float* dp = dscores + i * tiles.keys;
            const int64_t first = std::clamp<int64_t>(head.first_key(begin + i) - key, 0, keys);
            const int64_t last = std::clamp<int64_t>(head.end_key(begin + i) - key, first, keys);
            const int64_t statistic = head.statistic(begin + i);
            kernels.softmax_backward(dp + first, p + first, attention.lse[statistic], gradients.delta[statistic], scale,
                                     last - first);
            for (float* row : {p, dp}) {
                std::fill(row, row + first, 0.0f);
                std::fill(row + last, row + keys, 0.0f);
            }
        }
    }

    // sums (rows, padded head size) += left (packed, `k` steps) * right (panels over the head size)
    void add_product(float* sums, int64_t k, const float* left, const float* right, int64_t right_stride) const {
        for (int64_t panel = 0; panel < tiles.depth_panels(); ++panel)
            tiles.multiply(k, left, right + panel * right_stride, sums + panel * tiles.panel_columns, tiles.padded,
                           true);
    }

    // dq (rows, padded head size) += dscores (rows, keys) * k, for the keys that the panel sees.
    void add_dq(float* dq, const float* dscores, int64_t rows, int64_t visible, float* packed,
                const float* k_columns) const {
        tiles.products.pack_along[static_cast<int>(DType::fp32)](packed, dscores, tiles.keys, visible, rows,
                                                                 tiles.panel_rows);
        add_product(dq, visible, packed, k_columns, tiles.value_panel());
    }

    void store(const Tensor& row, const float* sums) const {
        kernels.narrow[static_cast<int>(row.dtype)](row.data, sums, tiles.depth);
    }

    template <class RowScratch>
    void compute_delta(const RowScratch& scratch, const AttentionHead& head, int64_t query, int64_t queries) const {
        for (int64_t i = query; i < query + queries; ++i) {
            const Tensor out = head.out_row(attention.out, i), dout = head.out_row(gradients.dout, i);
            kernels.widen[static_cast<int>(out.dtype)](scratch.out_row, out.data, tiles.depth);
            kernels.widen[static_cast<int>(dout.dtype)](scratch.dout_row, dout.data, tiles.depth);
            gradients.delta[head.statistic(i)] = kernels.dot(scratch.out_row, scratch.dout_row, tiles.depth);
        }
    }

    // dq of one tile of queries, and their delta.
    void run_queries(const AttentionHead& head, int64_t query, float* base) const {
        const QueryScratch scratch(tiles, base);
        const int64_t queries = std::min(tiles.queries, attention.query_rows - query);
        compute_delta(scratch, head, query, queries);
        pack_queries(scratch.score, head, query, queries);
        std::fill(scratch.dq, scratch.dq + tiles.queries * tiles.padded, 0.0f);
        const int64_t end = head.end_key(query + queries - 1);
        for (int64_t key = head.first_key(query, query + queries) / tiles.key_rows * tiles.key_rows; key < end;
             key += tiles.key_rows) {
            const int64_t keys = std::min(tiles.key_rows, end - key);
            pack_keys(scratch.score, head, key, keys);
            pack_columns(tiles.products, scratch.k_columns, head.key_row(attention.k, key), attention.kv_stride, keys,
                         tiles.panel_columns, tiles.depth, tiles.value_panel());
            for (int64_t row = 0; row < queries; row += tiles.panel_rows) {
                const int64_t rows = std::min(tiles.panel_rows, queries - row), begin = query + row;
                const int64_t visible = std::min(keys, head.end_key(begin + rows - 1) - key);
                if (visible <= 0 || head.first_key(begin, begin + rows) >= key + keys) continue;
                score(scratch.score, scratch.score.weights, scratch.score.dscores, head, row / tiles.panel_rows, begin,
                      rows, key, visible);
                add_dq(scratch.dq + row * tiles.padded, scratch.score.dscores, rows, visible, scratch.dscores,
                       scratch.k_columns);
            }
        }
        for (int64_t i = 0; i < queries; ++i)
            store(head.query_row(gradients.dq, query + i), scratch.dq + i * tiles.padded);
    }

    // sums (rows, padded head size) += left (queries, rows)^T * right (packed), over the queries from `first` on.
    void add_transposed(float* sums, const KeyScratch& scratch, const float* left, int64_t rows, int64_t first,
                        int64_t queries, const float* right) const {
        if (first >= queries) return;
        tiles.products.pack_across[static_cast<int>(DType::fp32)](scratch.transposed, left + first * tiles.keys,
                                                                  tiles.keys, queries - first, rows, tiles.panel_rows);
        add_product(sums, queries - first, scratch.transposed,
                    right + tiles.products.words(first) * tiles.panel_columns, tiles.row_panel());
    }

    // Adds what one tile of queries of one head contributes to dk and dv of a tile of keys.
    void add_queries(const KeyScratch& scratch, const AttentionHead& head, int64_t query, int64_t queries, int64_t key,
                     int64_t keys) const {
        pack_queries(scratch.score, head, query, queries);
        pack_columns(tiles.products, scratch.q_columns, head.query_row(attention.q, query), attention.q_stride, queries,
                     tiles.panel_columns, tiles.depth, tiles.row_panel());
        pack_columns(tiles.products, scratch.dout_columns, head.out_row(gradients.dout, query), head.out_stride(),
                     queries, tiles.panel_columns, tiles.depth, tiles.row_panel());
        // The first query, counted in the tile, that sees a key; earlier ones would add zeros to sums that begin at
        // zero.
        const auto first_seer = [&](int64_t k) {
            return std::clamp<int64_t>(k - attention.query_offset - query, 0, queries);
        };
        for (int64_t row = first_seer(key) / tiles.panel_rows * tiles.panel_rows; row < queries;
             row += tiles.panel_rows)
            score(scratch.score, scratch.score.weights + row * tiles.keys, scratch.score.dscores + row * tiles.keys,
                  head, row / tiles.panel_rows, query + row, std::min(tiles.panel_rows, queries - row), key, keys);
        for (int64_t row = 0; row < keys; row += tiles.panel_rows) {
            const int64_t rows = std::min(tiles.panel_rows, keys - row);
            const int64_t first = first_seer(key + row) / tiles.products.step_depth() * tiles.products.step_depth();
            add_transposed(scratch.dv + row * tiles.padded, scratch, scratch.score.weights + row, rows, first, queries,
                           scratch.dout_columns);
            add_transposed(scratch.dk + row * tiles.padded, scratch, scratch.score.dscores + row, rows, first, queries,
                           scratch.q_columns);
        }
    }

    void store_keys(const KeyScratch& scratch, const AttentionHead& head, int64_t key, int64_t keys) const {
        for (int64_t i = 0; i < keys; ++i) {
            store(head.key_row(gradients.dk, key + i), scratch.dk + i * tiles.padded);
            store(head.key_row(gradients.dv, key + i), scratch.dv + i * tiles.padded);
        }
    }

    // dk and dv of one tile of keys: over the heads that share them, then over tiles of queries, both ascending.
    // after(member, query, queries) is called with the scores of each pair of tiles in scratch.
    template <class After>
    void run_keys(const KeyScratch& scratch, int64_t batch, int64_t kv_head, int64_t key, const After& after) const {
        const int64_t keys = std::min(tiles.key_rows, attention.key_rows - key);
        const int64_t group = attention.heads / attention.kv_heads;
        std::fill(scratch.dk, scratch.dk + tiles.key_rows * tiles.padded, 0.0f);
        std::fill(scratch.dv, scratch.dv + tiles.key_rows * tiles.padded, 0.0f);
        const AttentionHead first(attention, batch, kv_head * group);
        pack_keys(scratch.score, first, key, keys);
        const int64_t first_query = std::max<int64_t>(0, key - attention.query_offset) / tiles.queries * tiles.queries;
        for (int64_t member = 0; member < group; ++member) {
            const AttentionHead head(attention, batch, kv_head * group + member);
            for (int64_t query = first_query; query < attention.query_rows; query += tiles.queries) {
                const int64_t queries = std::min(tiles.queries, attention.query_rows - query);
                if (head.first_key(query, query + queries) >= key + keys) continue;
                add_queries(scratch, head, query, queries, key, keys);
                after(member, query, queries);
            }
        }
        store_keys(scratch, first, key, keys);
    }

    // Floats of fp32 dq of one head, and of the heads that share a kv head.
    int64_t dq_floats() const { return ceil_to(attention.query_rows, tiles.queries) * tiles.padded; }
    int64_t group_floats() const { return attention.heads / attention.kv_heads * dq_floats(); }

    // Everything of the heads that share one kv head. dq: (group, padded query_rows, padded head size).
    void run_heads(int64_t batch, int64_t kv_head, float* base, float* dq) const {
        const HeadScratch scratch(tiles, base);
        const int64_t group = attention.heads / attention.kv_heads;
        std::fill(dq, dq + group_floats(), 0.0f);
        for (int64_t member = 0; member < group; ++member)
            compute_delta(scratch, AttentionHead(attention, batch, kv_head * group + member), 0, attention.query_rows);
        for (int64_t key = 0; key < attention.key_rows; key += tiles.key_rows) {
            const int64_t keys = std::min(tiles.key_rows, attention.key_rows - key);
            const AttentionHead first(attention, batch, kv_head * group);
            pack_columns(tiles.products, scratch.k_columns, first.key_row(attention.k, key), attention.kv_stride, keys,
                         tiles.panel_columns, tiles.depth, tiles.value_panel());
            run_keys(scratch.keys, batch, kv_head, key, [&](int64_t member, int64_t query, int64_t queries) {
                const AttentionHead head(attention, batch, kv_head * group + member);
                for (int64_t row = 0; row < queries; row += tiles.panel_rows) {
                    const int64_t rows = std::min(tiles.panel_rows, queries - row), begin = query + row;
                    const int64_t visible = std::min(keys, head.end_key(begin + rows - 1) - key);
                    if (visible <= 0 || head.first_key(begin, begin + rows) >= key + keys) continue;
                    add_dq(dq + member * dq_floats() + begin * tiles.padded,
                           scratch.keys.score.dscores + row * tiles.keys, rows, visible, scratch.dscores,
                           scratch.k_columns);
                }
            });
        }
        for (int64_t member = 0; member < group; ++member)
            for (int64_t i = 0; i < attention.query_rows; ++i)
                store(AttentionHead(attention, batch, kv_head * group + member).query_row(gradients.dq, i),
                      dq + member * dq_floats() + i * tiles.padded);
    }
};

// Whether heads share out evenly enough among threads, and the dq of those under way fits.
bool by_heads(const Pass& pass, const Workspace& workspace) {
    const int64_t pairs = pass.attention.batch * pass.attention.kv_heads, threads = workspace.threads();
    const int64_t slots = (pairs + threads - 1) / threads * threads;
    return 4 * slots <= 5 * pairs &&
           static_cast<std::size_t>(std::min(pairs, threads) * pass.group_floats()) <= workspace.size().shared_floats;
}

}  // namespace

WorkspaceNeed attention_workspace(const Kernels& kernels, int64_t head_size) {
    int64_t floats = 0;
    for (const DType type : {DType::fp32, DType::bf16}) {
        const AttentionTiles tiles(kernels.products(type, type), head_size);
        floats = std::max({floats, forward_floats(tiles), QueryScratch(tiles, nullptr).room.used(),
                           HeadScratch(tiles, nullptr).keys.room.used()});
    }
    return {static_cast<std::size_t>(floats), 0};
}

void attention_backward(const Kernels& kernels, Workspace& workspace, const Attention& attention, Tensor dq, Tensor dk,
                        Tensor dv, Tensor dout, float* delta) {
    check_attention(attention, "attention_backward");
    workspace.require(attention_workspace(kernels, attention.head_size), "attention_backward");
    const Gradients gradients{dq, dk, dv, dout, delta};
    check(dout.dtype == attention.q.dtype, "attention_backward: dout must have the type of q");
    const Pass pass{kernels, AttentionTiles(attention_products(kernels, attention), attention.head_size), attention,
                    gradients, score_scale(attention)};
    const AttentionTiles& tiles = pass.tiles;
    const int64_t kv_pairs = attention.batch * attention.kv_heads;
    if (by_heads(pass, workspace)) {
        parallel_for(workspace.threads(), kv_pairs, [&](int64_t task, int thread) {
            pass.run_heads(task / attention.kv_heads, task % attention.kv_heads, workspace.thread(thread),
                           workspace.shared() + thread * pass.group_floats());
        });
        return;
    }
    // In both passes the tiles with most to do go first, so that no thread is left with a long one at the end.
    const int64_t pairs = attention.batch * attention.heads;
    const int64_t query_tiles = (attention.query_rows + tiles.queries - 1) / tiles.queries;
    parallel_for(workspace.threads(), pairs * query_tiles, [&](int64_t task, int thread) {
        const int64_t pair = task % pairs, tile = query_tiles - 1 - task / pairs;
        const AttentionHead head(attention, pair / attention.heads, pair % attention.heads);
        pass.run_queries(head, tile * tiles.queries, workspace.thread(thread));
    });
    const int64_t key_tiles = (attention.key_rows + tiles.key_rows - 1) / tiles.key_rows;
    parallel_for(workspace.threads(), kv_pairs * key_tiles, [&](int64_t task, int thread) {
        const int64_t pair = task % kv_pairs, tile = task / kv_pairs;
        pass.run_keys(KeyScratch(tiles, workspace.thread(thread)), pair / attention.kv_heads, pair % attention.kv_heads,
                      tile * tiles.key_rows, [](int64_t, int64_t, int64_t) {});
    });
}

}  // namespace pytrain::cpu
