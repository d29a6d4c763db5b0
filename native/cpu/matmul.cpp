// Five loops around a register tile, after Goto and van de Geijn ("Anatomy of high-performance matrix multiplication",
// 2008) and BLIS. C is cut into regions; for each block of k, a region's panels of op(a) and op(b) are packed by all
// threads into the shared workspace, then its tasks, blocks of block_rows x task_columns, run tile by tile.
#include "cpu/matmul.h"

#include <algorithm>

#include "core/check.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

using std::int64_t;

// What is packed at once: large enough that a packed panel of one operand meets many of the other, small enough that
// both (1.5 and 4.5 MiB at a depth of 384) stay in a last-level cache.
constexpr int64_t kRegionRows = 1024;
constexpr int64_t kRegionColumns = 3072;
// Up to this many rows, packing all of op(b) beforehand costs more than using it: each task packs its own panels.
constexpr int64_t kSkinnyRows = 32;
// Tasks are made smaller until a region has this many (or they are down to a few tiles): enough for 64 threads.
constexpr int64_t kEnoughTasks = 128;
// Vectors (rows of op(a), columns of op(b)) that one packing task takes: some microseconds of work.
constexpr int64_t kPackVectors = 64;
// Rows of a source that are packed across at a time; 16 rows of a panel of any width are whole cache lines.
constexpr int64_t kPackRows = 16;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t multiple) { return ceil_divide(a, multiple) * multiple; }
constexpr int64_t kAlignFloats = 16;  // 64 bytes, what kernels.h promises of panels

// Where everything lies in the workspace, from the table alone.
struct Room {
    explicit Room(const Kernels& kernels)
        : region_rows(round_up(kRegionRows, kernels.tile_rows)),
          region_columns(round_up(kRegionColumns, kernels.tile_columns)),
          a_panel(round_up(kernels.tile_rows * kernels.block_depth, kAlignFloats)),
          b_panel(round_up(kernels.tile_columns * kernels.block_depth, kAlignFloats)),
          a_floats(region_rows / kernels.tile_rows * a_panel),
          b_floats(region_columns / kernels.tile_columns * b_panel),
          tile_floats(round_up(kernels.tile_rows * kernels.tile_columns, kAlignFloats)),
          row_floats(round_up(kernels.block_columns, kAlignFloats)) {}

    int64_t region_rows, region_columns;
    int64_t a_panel, b_panel;    // floats from one panel to the next
    int64_t a_floats, b_floats;  // shared: panels of a, panels of b, then sums (region_rows, region_columns)
    int64_t tile_floats;         // thread: a panel of b, a tile, then two rows of a task
    int64_t row_floats;
};

// One product on its way through the loops; `first_row` to `depth` say where it stands.
struct Run {
    Run(const Kernels& table, Workspace& space, const Matmul& asked)
        : kernels(table),
          workspace(space),
          product(asked),
          room(table),
          shared_sums(asked.c.dtype != DType::fp32),
          skinny(asked.m <= kSkinnyRows) {}

    const Kernels& kernels;
    Workspace& workspace;
    const Matmul& product;
    const Room room;
    const bool shared_sums;  // a 16-bit c is summed in fp32, beside
    const bool skinny;
    int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;  // the region
    int64_t first_depth = 0, depth = 0;                              // the block of k

    float* a_panels() const { return workspace.shared(); }
    float* b_panels() const { return workspace.shared() + room.a_floats; }
    float* sums() const { return workspace.shared() + room.a_floats + room.b_floats; }
    bool first_block() const { return first_depth == 0; }
    bool last_block() const { return first_depth + depth == product.k; }
};

// One operand as packing sees it: vectors (rows of op(a), columns of op(b)) of length k.
struct Operand {
    Tensor source;
    int64_t ld;
    bool along;              // k is the contiguous dimension as stored
    int64_t first, vectors;  // of the region
    int64_t tile;            // vectors of a panel
    int64_t stride;          // floats from one panel to the next
};

Operand operand_a(const Run& run) {
    const Matmul& product = run.product;
    return {product.a,       product.lda, product.transpose_a == Transpose::no,
            run.first_row,   run.rows,    run.kernels.tile_rows,
            run.room.a_panel};
}

Operand operand_b(const Run& run) {
    const Matmul& product = run.product;
    return {product.b,        product.ldb, product.transpose_b == Transpose::yes,
            run.first_column, run.columns, run.kernels.tile_columns,
            run.room.b_panel};
}

// Packs panels [begin, end) of the region's block of k; panel `begin` goes to `panels`.
void pack_panels(const Run& run, const Operand& operand, float* panels, int64_t begin, int64_t end) {
    const auto type = static_cast<int>(operand.source.dtype);
    const auto kernel = operand.along ? run.kernels.pack_along[type] : run.kernels.pack_across[type];
    // Rows of the source a power of two apart fall into the same few sets of a cache: their lines, which reach into the
    // next panels, would be gone again before those are packed. So a few rows are spread over all panels before the
    // next few.
    const int64_t step = operand.along ? std::max<int64_t>(run.depth, 1) : kPackRows;
    for (int64_t p = 0; p < run.depth; p += step)
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t vector = operand.first + panel * operand.tile, k = run.first_depth + p;
            const int64_t offset = operand.along ? vector * operand.ld + k : k * operand.ld + vector;
            kernel(panels + (panel - begin) * operand.stride + p * operand.tile, operand.source.at(offset).data,
                   operand.ld, std::min(step, run.depth - p),
                   std::min(operand.tile, operand.vectors - panel * operand.tile), operand.tile);
        }
}

void pack_region(const Run& run) {
    const Operand a = operand_a(run), b = operand_b(run);
    const int64_t a_panels = ceil_divide(a.vectors, a.tile), b_panels = run.skinny ? 0 : ceil_divide(b.vectors, b.tile);
    const int64_t a_step = std::max<int64_t>(1, kPackVectors / a.tile),
                  b_step = std::max<int64_t>(1, kPackVectors / b.tile);
    const int64_t a_tasks = ceil_divide(a_panels, a_step);
    parallel_for(run.workspace.threads(), a_tasks + ceil_divide(b_panels, b_step), [&](int64_t task, int) {
        const bool first = task < a_tasks;
        const int64_t begin = first ? task * a_step : (task - a_tasks) * b_step;
        if (first)
            pack_panels(run, a, run.a_panels() + begin * a.stride, begin, std::min(a_panels, begin + a_step));
        else
            pack_panels(run, b, run.b_panels() + begin * b.stride, begin, std::min(b_panels, begin + b_step));
    });
}

// One tile at (row, column) of the region. A tile that c cuts off is computed beside it.
void compute_tile(const Run& run, float* scratch, const float* a, const float* b, int64_t row, int64_t column) {
    const Kernels& kernels = run.kernels;
    if (run.shared_sums) {  // padded to whole tiles
        float* out = run.sums() + row * run.room.region_columns + column;
        kernels.matmul_tile(run.depth, a, b, out, run.room.region_columns, !run.first_block());
        return;
    }
    const bool accumulate = run.product.accumulate || !run.first_block();
    const int64_t ldc = run.product.ldc;
    float* out = static_cast<float*>(run.product.c.data) + (run.first_row + row) * ldc + run.first_column + column;
    const int64_t rows = std::min(kernels.tile_rows, run.rows - row);
    const int64_t columns = std::min(kernels.tile_columns, run.columns - column);
    if (rows == kernels.tile_rows && columns == kernels.tile_columns) {
        kernels.matmul_tile(run.depth, a, b, out, ldc, accumulate);
        return;
    }
    const auto copy = kernels.widen[static_cast<int>(DType::fp32)];
    if (accumulate)
        for (int64_t i = 0; i < rows; ++i) copy(scratch + i * kernels.tile_columns, out + i * ldc, columns);
    kernels.matmul_tile(run.depth, a, b, scratch, kernels.tile_columns, accumulate);
    for (int64_t i = 0; i < rows; ++i) copy(out + i * ldc, scratch + i * kernels.tile_columns, columns);
}

// Adds `source` (n) to row (n).
void add_row(const Kernels& kernels, float* row, const Tensor& source, int64_t n, float* scratch) {
    if (source.dtype == DType::fp32) {
        kernels.add(row, static_cast<const float*>(source.data), n);
        return;
    }
    kernels.widen[static_cast<int>(source.dtype)](scratch, source.data, n);
    kernels.add(row, scratch, n);
}

// activated (n) = activation(c (n)), from c as stored.
void activate_row(const Kernels& kernels, const Tensor& activated, const Tensor& c, int64_t n, float* scratch) {
    const float* x = static_cast<const float*>(c.data);
    if (c.dtype != DType::fp32) {
        kernels.widen[static_cast<int>(c.dtype)](scratch, c.data, n);
        x = scratch;
    }
    if (activated.dtype == DType::fp32) {
        kernels.gelu_forward(static_cast<float*>(activated.data), x, n);
        return;
    }
    kernels.gelu_forward(scratch, x, n);
    kernels.narrow[static_cast<int>(activated.dtype)](activated.data, scratch, n);
}

// After the last block of k, while a task's block of c is in cache: accumulate, bias, residual, rounding, activation.
void finish_block(const Run& run, float* scratch, int64_t row_begin, int64_t row_end, int64_t column, int64_t n) {
    const Kernels& kernels = run.kernels;
    const Matmul& product = run.product;
    const bool activate = product.activation != Activation::none;
    if (!run.shared_sums && !product.bias && !product.residual && !activate) return;
    float* bias = scratch + run.room.row_floats;
    const int64_t j = run.first_column + column;
    if (product.bias) kernels.widen[static_cast<int>(product.bias.dtype)](bias, product.bias.at(j).data, n);
    for (int64_t i = row_begin; i < row_end; ++i) {
        const int64_t row = run.first_row + i;
        const Tensor c = product.c.at(row * product.ldc + j);
        float* sum = run.shared_sums ? run.sums() + i * run.room.region_columns + column : static_cast<float*>(c.data);
        if (run.shared_sums && product.accumulate) add_row(kernels, sum, c, n, scratch);
        if (product.bias) kernels.add(sum, bias, n);
        if (product.residual) add_row(kernels, sum, product.residual.at(row * product.ldresidual + j), n, scratch);
        if (run.shared_sums) kernels.narrow[static_cast<int>(c.dtype)](c.data, sum, n);
        if (activate) activate_row(kernels, product.activated.at(row * product.ldactivated + j), c, n, scratch);
    }
}

// Rows [row_begin, row_end) and columns [column_begin, column_end) of the region, one block of k.
void compute_block(const Run& run, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                   int thread) {
    const int64_t tile_rows = run.kernels.tile_rows, tile_columns = run.kernels.tile_columns;
    float* own_panel = run.workspace.thread(thread);
    float* tile = own_panel + run.room.b_panel;
    const auto a_panel = [&](int64_t row) { return run.a_panels() + row / tile_rows * run.room.a_panel; };
    if (run.skinny) {
        for (int64_t column = column_begin; column < column_end; column += tile_columns) {
            pack_panels(run, operand_b(run), own_panel, column / tile_columns, column / tile_columns + 1);
            for (int64_t row = row_begin; row < row_end; row += tile_rows)
                compute_tile(run, tile, a_panel(row), own_panel, row, column);
        }
    } else {
        // A panel of a is read from the first-level cache by every tile of its row, those of b stream from the second.
        for (int64_t row = row_begin; row < row_end; row += tile_rows)
            for (int64_t column = column_begin; column < column_end; column += tile_columns)
                compute_tile(run, tile, a_panel(row), run.b_panels() + column / tile_columns * run.room.b_panel, row,
                             column);
    }
    if (run.last_block())
        finish_block(run, tile + run.room.tile_floats, row_begin, row_end, column_begin, column_end - column_begin);
}

void compute_region(const Run& run) {
    int64_t task_rows = std::min(run.kernels.block_rows, round_up(run.rows, run.kernels.tile_rows));
    int64_t task_columns = run.kernels.block_columns;
    const auto tasks = [&] { return ceil_divide(run.rows, task_rows) * ceil_divide(run.columns, task_columns); };
    while (tasks() < kEnoughTasks && task_columns > 2 * run.kernels.tile_columns)
        task_columns = round_up(task_columns / 2, run.kernels.tile_columns);
    while (tasks() < kEnoughTasks && task_rows > 4 * run.kernels.tile_rows)
        task_rows = round_up(task_rows / 2, run.kernels.tile_rows);
    const int64_t down = ceil_divide(run.rows, task_rows);
    parallel_for(run.workspace.threads(), tasks(), [&](int64_t task, int thread) {
        // Neighbours in time share their columns, whose panels are the larger part of a task's reading.
        const int64_t row = task % down * task_rows, column = task / down * task_columns;
        compute_block(run, row, std::min(row + task_rows, run.rows), column,
                      std::min(column + task_columns, run.columns), thread);
    });
}

void check_product(const Matmul& product) {
    check(product.m >= 0 && product.n >= 0 && product.k >= 0, "matmul: the sizes m, n, k must not be negative, not ",
          product.m, ", ", product.n, ", ", product.k);
    check(!product.residual || product.residual.data != product.c.data,
          "matmul: residual may not be c; accumulate adds to c");
    check(product.activation == Activation::none || product.activated, "matmul: an activation needs `activated`");
}

}  // namespace

WorkspaceNeed matmul_workspace(const Kernels& kernels) {
    const Room room(kernels);
    const int64_t thread = room.b_panel + room.tile_floats + 2 * room.row_floats;
    const int64_t shared = room.a_floats + room.b_floats + room.region_rows * room.region_columns;
    return {static_cast<std::size_t>(thread), static_cast<std::size_t>(shared)};
}

void matmul(const Kernels& kernels, Workspace& workspace, const Matmul& product) {
    check_product(product);
    workspace.require(matmul_workspace(kernels), "matmul");
    if (product.m == 0 || product.n == 0) return;
    Run run(kernels, workspace, product);
    // Regions of nearly equal size, rather than a thin last one.
    const int64_t down = ceil_divide(product.m, run.room.region_rows),
                  across = ceil_divide(product.n, run.room.region_columns);
    const int64_t region_rows = round_up(ceil_divide(product.m, down), kernels.tile_rows);
    const int64_t region_columns = round_up(ceil_divide(product.n, across), kernels.tile_columns);
    for (run.first_column = 0; run.first_column < product.n; run.first_column += region_columns) {
        run.columns = std::min(region_columns, product.n - run.first_column);
        for (run.first_row = 0; run.first_row < product.m; run.first_row += region_rows) {
            run.rows = std::min(region_rows, product.m - run.first_row);
            run.first_depth = 0;
            do {  // once even for k = 0: the sum is then zero, and the rest still to be done
                run.depth = std::min(kernels.block_depth, product.k - run.first_depth);
                pack_region(run);
                compute_region(run);
                run.first_depth += run.depth;
            } while (run.first_depth < product.k);
        }
    }
}

}  // namespace pytrain::cpu
