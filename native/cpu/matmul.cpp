// Five loops around a register tile, after Goto and van de Geijn ("Anatomy of high-performance matrix multiplication",
// 2008) and BLIS. C is cut into regions; for each block of k, a region's panels of op(a) are packed by all threads into
// the shared workspace. Most column blocks of op(b) are packed by the thread that then multiplies them with all rows;
// the rest, which lets threads finish together, is packed by all and cut into small tasks. These run tile by tile, and
// between the tiles they ask for what is packed next.
#include "cpu/matmul.h"

#include <algorithm>

#include "core/check.h"
#include "cpu/packing.h"
#include "cpu/product_run.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

using std::int64_t;

// Tasks are made smaller until a region has this many (or they are down to a few tiles): enough for 64 threads.
constexpr int64_t kEnoughTasks = 128;

// A task: panels of a and columns of the region, and the thread's scratch. `sums` begins at (row_begin, column_begin).
struct Task {
    int64_t panel_begin, panel_end;  // of a
    int64_t row_begin, row_end;      // theirs
    int64_t column_begin, column_end;
    float *panel, *tile, *row;  // see Room
    float* sums;
    int64_t sums_stride;

    float* sum(int64_t row_index, int64_t column) const {
        return sums + (row_index - row_begin) * sums_stride + column - column_begin;
    }
};

Task make_task(const ProductRun& run, int64_t panel_begin, int64_t panel_end, int64_t column_begin, int64_t column_end,
               int thread) {
    const int64_t row_begin = run.row_panels.begin(panel_begin), row_end = run.row_panels.begin(panel_end);
    Task task{panel_begin, panel_end, row_begin, row_end, column_begin, column_end, run.workspace.thread(thread),
              nullptr,     nullptr,   nullptr,   0};
    task.tile = task.panel + run.room.own_panels;
    task.row = task.tile + run.room.tile_floats;
    if (run.sums == Sums::thread) {
        task.sums = task.row + 2 * run.room.row_floats;
        task.sums_stride = run.products.block_columns;
    } else if (run.sums == Sums::shared) {
        task.sums = run.shared_sums() + row_begin * run.room.region_columns + column_begin;
        task.sums_stride = run.room.region_columns;
    }
    return task;
}

// Asks for the part of a 16-bit c that lies under a tile: it is written as soon as the tile's row is done.
void ask_for_c(const ProductRun& run, int64_t row, int64_t rows, int64_t column) {
    const int64_t last = std::min(run.products.tile_columns, run.columns - column) - 1;
    for (int64_t i = 0; i < rows; ++i) {
        const Tensor c = run.product.c.at((run.first_row + row + i) * run.product.ldc + run.first_column + column);
        __builtin_prefetch(c.data, 1);
        __builtin_prefetch(c.at(last).data, 1);
    }
}

// c = a * b, or += with accumulate, of a panel of a of `rows` rows, padding included.
void multiply_tile(const Products& table, int64_t rows, int64_t words, const float* a, const float* b, float* c,
                   int64_t ldc, bool accumulate) {
    if (rows == table.tile_rows)
        table.matmul_tile(words, a, b, c, ldc, accumulate);
    else
        table.matmul_low(rows, words, a, b, c, ldc, accumulate);
}

// One tile: a panel of a and, at `b`, one of b, which begins at `column` of the region. A tile that c cuts off is
// computed beside it.
void compute_tile(const ProductRun& run, const Task& task, int64_t panel, const float* b, int64_t column) {
    const Products& table = run.products;
    const Panels& panels = run.row_panels;
    const float* const a = run.a_panels() + panel * run.room.a_panel;
    const int64_t words = table.words(run.depth);
    const int64_t row = panels.begin(panel), rows = panels.width(panel), padded = panels.padded(panel);
    if (run.sums != Sums::in_place) {  // has room for the padding
        if (run.last_block()) ask_for_c(run, row, rows, column);
        multiply_tile(table, padded, words, a, b, task.sum(row, column), task.sums_stride, !run.first_block());
        return;
    }
    const bool accumulate = run.product.accumulate || !run.first_block();
    const int64_t ldc = run.product.ldc;
    float* out = static_cast<float*>(run.product.c.data) + (run.first_row + row) * ldc + run.first_column + column;
    const int64_t columns = std::min(table.tile_columns, run.columns - column);
    if (rows == padded && columns == table.tile_columns) {
        multiply_tile(table, padded, words, a, b, out, ldc, accumulate);
        return;
    }
    const auto copy = run.kernels.widen[static_cast<int>(DType::fp32)];
    if (accumulate)
        for (int64_t i = 0; i < rows; ++i) copy(task.tile + i * table.tile_columns, out + i * ldc, columns);
    multiply_tile(table, padded, words, a, b, task.tile, table.tile_columns, accumulate);
    for (int64_t i = 0; i < rows; ++i) copy(out + i * ldc, task.tile + i * table.tile_columns, columns);
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
    if (activated.dtype == c.dtype) {
        kernels.gelu_forward[static_cast<int>(c.dtype)](activated.data, c.data, n);
        return;
    }
    kernels.widen[static_cast<int>(c.dtype)](scratch, c.data, n);
    kernels.gelu_forward[static_cast<int>(DType::fp32)](scratch, scratch, n);
    kernels.narrow[static_cast<int>(activated.dtype)](activated.data, scratch, n);
}

// Rows [begin, end) of a task after the last block of k, while they are in cache: accumulate, bias, residual, rounding,
// activation.
void finish_rows(const ProductRun& run, const Task& task, int64_t begin, int64_t end) {
    const Kernels& kernels = run.kernels;
    const Matmul& product = run.product;
    const bool beside = run.sums != Sums::in_place, activate = product.activation != Activation::none;
    if (!beside && !product.bias && !product.residual && !activate) return;
    float* const scratch = task.row;
    float* const bias = scratch + run.room.row_floats;
    const int64_t j = run.first_column + task.column_begin, n = task.column_end - task.column_begin;
    if (product.bias) kernels.widen[static_cast<int>(product.bias.dtype)](bias, product.bias.at(j).data, n);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = run.first_row + i;
        const Tensor c = product.c.at(row * product.ldc + j);
        float* sum = beside ? task.sum(i, task.column_begin) : static_cast<float*>(c.data);
        if (beside && product.accumulate) add_row(kernels, sum, c, n, scratch);
        if (product.bias) kernels.add(sum, bias, n);
        if (product.residual) add_row(kernels, sum, product.residual.at(row * product.ldresidual + j), n, scratch);
        if (beside) kernels.narrow[static_cast<int>(c.dtype)](c.data, sum, n);
        if (activate) activate_row(kernels, product.activated.at(row * product.ldactivated + j), c, n, scratch);
    }
}

// One block of k. Each of the few rows is multiplied while the panel of b that the thread has packed is in cache.
void compute_skinny_task(const ProductRun& run, const Task& task) {
    const int64_t tile_columns = run.products.tile_columns;
    for (int64_t column = task.column_begin; column < task.column_end; column += tile_columns) {
        pack_panels(run, shared_b(run), task.panel, column / tile_columns, column / tile_columns + 1);
        for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
            compute_tile(run, task, panel, task.panel, column);
    }
    if (run.last_block()) finish_rows(run, task, task.row_begin, task.row_end);
}

int64_t count_tiles(const ProductRun& run, int64_t panels, int64_t columns) {
    return panels * ceil_divide(columns, run.products.tile_columns);
}

// One block of k, whose panels of b for the task's columns begin at `b`. A panel of a is read from the first-level
// cache by every tile of its row, those of b stream from the second.
void compute_task(const ProductRun& run, const Task& task, const float* b, Asking& asking) {
    const int64_t tile_columns = run.products.tile_columns;
    for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        for (int64_t column = task.column_begin; column < task.column_end; column += tile_columns) {
            asking.ask();
            const int64_t index = (column - task.column_begin) / tile_columns;
            compute_tile(run, task, panel, b + index * run.room.b_panel, column);
        }
        if (run.last_block()) finish_rows(run, task, run.row_panels.begin(panel), run.row_panels.begin(panel + 1));
    }
}

// A column block with all rows of the region, packed here.
void compute_own_block(const ProductRun& run, const Next& next, int64_t block, int64_t tasks, int thread) {
    const Operand b = own_b(run, block);
    const int64_t column = block * run.products.block_columns, panels = run.row_panels.count;
    const int64_t step = run.products.block_rows / run.products.tile_rows;
    Asking asking(next, block, tasks, count_tiles(run, panels, b.panels.vectors), next.after_block(run, block));
    pack_panels(run, b, run.workspace.thread(thread), 0, b.panels.count);
    for (int64_t panel = 0; panel < panels; panel += step) {  // as many rows as have room in the thread's scratch
        const Task task =
            make_task(run, panel, std::min(panel + step, panels), column, column + b.panels.vectors, thread);
        compute_task(run, task, task.panel, asking);
    }
}

// How the columns that all threads pack together are cut into tasks.
struct Cut {
    explicit Cut(const ProductRun& run)
        : panels(std::min(run.products.block_rows / run.products.tile_rows, run.row_panels.count)),
          columns(run.products.block_columns) {
        const int64_t tile = run.products.tile_columns, rest = run.columns - run.own_columns;
        const auto count = [&] { return ceil_divide(run.row_panels.count, panels) * ceil_divide(rest, columns); };
        while (count() < kEnoughTasks && columns > 2 * tile) columns = round_up(columns / 2, tile);
        while (count() < kEnoughTasks && panels > 4) panels = ceil_divide(panels, 2);
        down = ceil_divide(run.row_panels.count, panels);
        tasks = count();
    }

    int64_t panels, columns;  // of a task
    int64_t down, tasks;      // tasks below each other, and all
};

void compute_region(const ProductRun& run) {
    const Cut cut(run);
    const Next next(run);
    const int64_t all = run.own_blocks + cut.tasks;
    parallel_for(run.workspace.threads(), all, [&](int64_t index, int thread) {
        if (index < run.own_blocks) {
            compute_own_block(run, next, index, all, thread);
            return;
        }
        // Neighbours in time share their columns, whose panels are the larger part of a task's reading.
        const int64_t place = index - run.own_blocks;
        const int64_t panel = place % cut.down * cut.panels;
        const int64_t column = run.own_columns + place / cut.down * cut.columns;
        const Task task = make_task(run, panel, std::min(panel + cut.panels, run.row_panels.count), column,
                                    std::min(column + cut.columns, run.columns), thread);
        if (run.skinny) {
            compute_skinny_task(run, task);
            return;
        }
        Asking asking(next, index, all, count_tiles(run, cut.panels, cut.columns));
        const int64_t first = (column - run.own_columns) / run.products.tile_columns;
        compute_task(run, task, run.b_panels() + first * run.room.b_panel, asking);
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
    WorkspaceNeed need;
    for (const DType type : {DType::fp32, DType::bf16, DType::fp16}) {
        const Room room(kernels.matrix_products(type, type));
        need.thread_floats = std::max(need.thread_floats, static_cast<std::size_t>(room.thread()));
        need.shared_floats = std::max(need.shared_floats, static_cast<std::size_t>(room.shared()));
    }
    return need;
}

void matmul(const Kernels& kernels, Workspace& workspace, const Matmul& product) {
    check_product(product);
    workspace.require(matmul_workspace(kernels), "matmul");
    if (product.m == 0 || product.n == 0) return;
    ProductRun run(kernels, workspace, product);
    do {  // once even for k = 0: the sum is then zero, and the rest still to be done
        pack_region(run);
        compute_region(run);
    } while (run.advance());
}

}  // namespace pytrain::cpu
