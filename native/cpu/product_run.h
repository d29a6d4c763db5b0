// One matrix product on its way through the loops of matmul.cpp: how it is cut, and where it stands.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/matmul.h"
#include "cpu/panels.h"
#include "cpu/room.h"

namespace pytrain::cpu {

// Up to this many rows, packing all of op(b) beforehand costs more than using it: each task packs its own panels.
constexpr std::int64_t kSkinnyRows = 32;
// Blocks of k are cut to a multiple of this: whole steps of any table, and whole chains of fp16 sums, which are 64
// words of two elements.
constexpr std::int64_t kDepthStep = 128;

// Where a 16-bit c is summed in fp32: in the thread's own scratch where one block of k is all there is, so that the
// sums are rounded before they leave the second-level cache; else in the workspace, from block to block.
enum class Sums : std::uint8_t { in_place, thread, shared };

inline Sums choose_sums(const Matmul& product, const Products& table) {
    if (product.c.dtype == DType::fp32) return Sums::in_place;
    return product.k <= table.block_depth ? Sums::thread : Sums::shared;
}

// Depth of the blocks that k is cut in, at most `most`: nearly equal ones rather than a thin last one.
inline std::int64_t choose_depth(std::int64_t k, std::int64_t most) {
    if (k <= most) return most;
    return std::min(most, round_up(ceil_divide(k, ceil_divide(k, most)), kDepthStep));
}

// One product on its way through the loops; `first_row` to `depth` say where it stands.
struct ProductRun {
    ProductRun(const Kernels& table, Workspace& space, const Matmul& asked)
        : kernels(table),
          products(table.matrix_products(asked.a.dtype, asked.b.dtype)),
          workspace(space),
          product(asked),
          room(products),
          sums(choose_sums(asked, products)),
          skinny(asked.m <= kSkinnyRows),
          block_depth(choose_depth(asked.k, products.block_depth)),
          // Regions of nearly equal size, rather than a thin last one.
          region_rows(round_up(ceil_divide(asked.m, ceil_divide(asked.m, room.region_rows)), products.tile_rows)),
          region_columns(
              round_up(ceil_divide(asked.n, ceil_divide(asked.n, room.region_columns)), products.tile_columns)) {
        measure();
    }

    const Kernels& kernels;
    const Products products;
    Workspace& workspace;
    const Matmul& product;
    const Room room;
    const Sums sums;
    const bool skinny;
    const std::int64_t block_depth;
    const std::int64_t region_rows, region_columns;
    std::int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;  // the region
    std::int64_t first_depth = 0, depth = 0;                              // the block of k
    std::int64_t own_blocks = 0, own_columns = 0;  // of columns, from the first on: see choose_own_blocks
    Panels row_panels;                             // of the region

    float* a_panels() const { return workspace.shared(); }
    float* b_panels() const { return workspace.shared() + room.a_floats; }
    float* shared_sums() const { return workspace.shared() + room.a_floats + room.b_floats; }
    bool first_block() const { return first_depth == 0; }
    bool last_block() const { return first_depth + depth == product.k; }
    // Panels that the region before has left are not packed again.
    bool packs_a() const { return first_column == 0 || product.m > region_rows || product.k > block_depth; }
    bool packs_b() const { return !skinny && (first_row == 0 || product.k > block_depth); }

    // Goes on to the next block of k, or to the first of the next region. False after the last.
    bool advance() {
        first_depth += block_depth;
        if (first_depth >= product.k) first_depth = 0, first_row += region_rows;
        if (first_row >= product.m) first_row = 0, first_column += region_columns;
        if (first_column >= product.n) return false;
        measure();
        return true;
    }

private:
    // How many column blocks are packed by the task that computes them, into the thread's own scratch, just before:
    // their panels go from there to the tiles without a way through the last-level cache, and nobody waits for them.
    // Such a task has all rows of the region, so threads need several of them each, and something smaller at the end
    // to finish together. Panels that serve several regions are packed for all.
    std::int64_t choose_own_blocks() const {
        const std::int64_t blocks = ceil_divide(columns, products.block_columns), threads = workspace.threads();
        if (skinny || (product.m > region_rows && product.k <= block_depth)) return 0;
        return threads == 1 ? blocks : blocks * 3 / 4 / threads * threads;
    }

    void measure() {
        rows = std::min(region_rows, product.m - first_row);
        columns = std::min(region_columns, product.n - first_column);
        depth = std::min(block_depth, product.k - first_depth);
        own_blocks = choose_own_blocks();
        own_columns = std::min(own_blocks * products.block_columns, columns);
        row_panels = Panels(rows, products.tile_rows, products.matmul_low ? products.low_step : 0);
    }
};

// One operand as packing sees it: vectors (rows of op(a), columns of op(b)) of length k.
struct Operand {
    Tensor source;
    std::int64_t ld;
    bool along;           // k is the contiguous dimension as stored
    std::int64_t first;   // of the region
    Panels panels;        // of the region
    std::int64_t stride;  // words from one panel to the next
};

inline Operand operand_a(const ProductRun& run) {
    const Matmul& product = run.product;
    return {product.a,     product.lda,    product.transpose_a == Transpose::no,
            run.first_row, run.row_panels, run.room.a_panel};
}

// Of columns [begin, end) of the region.
inline Operand operand_b(const ProductRun& run, std::int64_t begin, std::int64_t end) {
    const Matmul& product = run.product;
    const Panels panels(end - begin, run.products.tile_columns, 0);
    return {product.b, product.ldb,     product.transpose_b == Transpose::yes, run.first_column + begin,
            panels,    run.room.b_panel};
}

// The columns that are packed for all threads.
inline Operand shared_b(const ProductRun& run) { return operand_b(run, run.own_columns, run.columns); }

// A column block that its task packs.
inline Operand own_b(const ProductRun& run, std::int64_t block) {
    const std::int64_t begin = block * run.products.block_columns;
    return operand_b(run, begin, std::min(begin + run.products.block_columns, run.columns));
}

}  // namespace pytrain::cpu
