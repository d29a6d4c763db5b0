// Five loops around a register tile, after Goto and van de Geijn ("Anatomy of high-performance matrix multiplication",
// 2008) and BLIS. C is cut into regions; for each block of k, a region's panels of op(a) are packed by all threads into
// the shared workspace. Most column blocks of op(b) are packed by the thread that then multiplies them with all rows;
// the rest, which lets threads finish together, is packed by all and cut into small tasks. These run tile by tile, and
// between the tiles they ask for what is packed next.
#include "cpu/matmul.h"

#include <algorithm>

#include "core/check.h"
#include "cpu/panels.h"
#include "cpu/room.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

using std::int64_t;

// Up to this many rows, packing all of op(b) beforehand costs more than using it: each task packs its own panels.
constexpr int64_t kSkinnyRows = 32;
// Tasks are made smaller until a region has this many (or they are down to a few tiles): enough for 64 threads.
constexpr int64_t kEnoughTasks = 128;
// Vectors (rows of op(a), columns of op(b)) that one packing task takes: some microseconds of work. Across, each row of
// the source gives a piece as long as this: short ones would leave memory waiting, so tasks are larger unless there
// are too few of them for the threads.
constexpr int64_t kPackVectors = 64;
constexpr int64_t kMostPackVectors = 512;
constexpr int64_t kPackTasksPerThread = 4;
// Rows of a source that are packed across at a time; as many rows of a panel of any width are whole cache lines.
constexpr int64_t kPackRows = 32;
// Blocks of k are cut to a multiple of this: whole steps of any table, and whole chains of fp16 sums.
constexpr int64_t kDepthStep = 64;

// Where a 16-bit c is summed in fp32: in the thread's own scratch where one block of k is all there is, so that the
// sums are rounded before they leave the second-level cache; else in the workspace, from block to block.
enum class Sums : std::uint8_t { in_place, thread, shared };

Sums choose_sums(const Matmul& product, const Products& table) {
    if (product.c.dtype == DType::fp32) return Sums::in_place;
    return product.k <= table.block_depth ? Sums::thread : Sums::shared;
}

// Depth of the blocks that k is cut in, at most `most`: nearly equal ones rather than a thin last one.
int64_t choose_depth(int64_t k, int64_t most) {
    if (k <= most) return most;
    return std::min(most, round_up(ceil_divide(k, ceil_divide(k, most)), kDepthStep));
}

// One product on its way through the loops; `first_row` to `depth` say where it stands.
struct Run {
    Run(const Kernels& table, Workspace& space, const Matmul& asked)
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
    const int64_t block_depth;
    const int64_t region_rows, region_columns;
    int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;  // the region
    int64_t first_depth = 0, depth = 0;                              // the block of k
    int64_t own_blocks = 0, own_columns = 0;  // of columns, from the first on: see choose_own_blocks
    Panels row_panels;                        // of the region

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
    int64_t choose_own_blocks() const {
        const int64_t blocks = ceil_divide(columns, products.block_columns), threads = workspace.threads();
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
    int64_t ld;
    bool along;      // k is the contiguous dimension as stored
    int64_t first;   // of the region
    Panels panels;   // of the region
    int64_t stride;  // words from one panel to the next
};

Operand operand_a(const Run& run) {
    const Matmul& product = run.product;
    return {product.a,     product.lda,    product.transpose_a == Transpose::no,
            run.first_row, run.row_panels, run.room.a_panel};
}

// Of columns [begin, end) of the region.
Operand operand_b(const Run& run, int64_t begin, int64_t end) {
    const Matmul& product = run.product;
    const Panels panels(end - begin, run.products.tile_columns, 0);
    return {product.b, product.ldb,     product.transpose_b == Transpose::yes, run.first_column + begin,
            panels,    run.room.b_panel};
}

// The columns that are packed for all threads.
Operand shared_b(const Run& run) { return operand_b(run, run.own_columns, run.columns); }

// A column block that its task packs.
Operand own_b(const Run& run, int64_t block) {
    const int64_t begin = block * run.products.block_columns;
    return operand_b(run, begin, std::min(begin + run.products.block_columns, run.columns));
}

// Packs panels [begin, end) of the region's block of k; panel `begin` goes to `panels`.
void pack_panels(const Run& run, const Operand& operand, float* panels, int64_t begin, int64_t end) {
    const auto type = static_cast<int>(operand.source.dtype);
    const auto kernel = operand.along ? run.products.pack_along[type] : run.products.pack_across[type];
    // Rows of the source a power of two apart fall into the same few sets of a cache: their lines, which reach into the
    // next panels, would be gone again before those are packed. So a few rows are spread over all panels before the
    // next few.
    const int64_t step = operand.along ? std::max<int64_t>(run.depth, 1) : kPackRows;
    for (int64_t p = 0; p < run.depth; p += step) {
        const int64_t k = run.first_depth + p, n = std::min(step, run.depth - p), words = run.products.words(p);
        for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t vector = operand.first + operand.panels.begin(panel), width = operand.panels.padded(panel);
            const int64_t offset = operand.along ? vector * operand.ld + k : k * operand.ld + vector;
            kernel(panels + (panel - begin) * operand.stride + words * width, operand.source.at(offset).data,
                   operand.ld, n, operand.panels.width(panel), width);
        }
    }
}

// Panels of one packing task. What is packed does not depend on it.
int64_t panels_per_task(const Run& run, const Operand& operand) {
    int64_t vectors = kPackVectors;
    while (!operand.along && vectors < kMostPackVectors &&
           operand.panels.vectors >= 2 * vectors * kPackTasksPerThread * run.workspace.threads())
        vectors *= 2;
    return std::max<int64_t>(1, vectors / operand.panels.tile);
}

void pack_region(const Run& run) {
    const Operand a = operand_a(run), b = shared_b(run);
    const int64_t a_panels = run.packs_a() ? a.panels.count : 0;
    const int64_t b_panels = run.packs_b() ? b.panels.count : 0;
    const int64_t a_step = panels_per_task(run, a), b_step = panels_per_task(run, b);
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

// The lines of one operand that the next call of pack_region will read, row by row as they are stored.
struct Ahead {
    Ahead() = default;
    Ahead(const Run& next, const Operand& operand) {
        const int64_t size = static_cast<int64_t>(size_of(operand.source.dtype)), k = next.first_depth;
        const int64_t rows = operand.along ? operand.panels.vectors : next.depth;
        const int64_t elements = operand.along ? next.depth : operand.panels.vectors;
        const int64_t offset = operand.along ? operand.first * operand.ld + k : k * operand.ld + operand.first;
        begin = static_cast<const char*>(operand.source.at(offset).data);
        row_bytes = operand.ld * size;
        lines_per_row = ceil_divide(elements * size, kLine);
        lines = rows * lines_per_row;
    }

    void ask(int64_t first, int64_t last) const {
        if (first >= last) return;
        int64_t row = first / lines_per_row, line = first % lines_per_row;
        for (int64_t i = first; i < last; ++i) {
            __builtin_prefetch(begin + row * row_bytes + line * kLine, 0, 2);
            if (++line == lines_per_row) line = 0, ++row;
        }
    }

    static constexpr int64_t kLine = 64;
    const char* begin = nullptr;
    int64_t row_bytes = 0, lines_per_row = 1, lines = 0;
};

// What is packed after a region's block of k. Packing alone waits for memory most of its time; a source that was asked
// for between the tiles of the block before, a few lines each, waits in cache instead.
struct Next {
    explicit Next(const Run& now) : run(now), any(run.advance()) {
        if (any && run.packs_a()) a = Ahead(run, operand_a(run));
        if (any && run.packs_b()) b = Ahead(run, shared_b(run));
    }

    int64_t lines() const { return a.lines + b.lines; }
    void ask(int64_t first, int64_t last) const {
        a.ask(first, std::min(last, a.lines));
        b.ask(std::max<int64_t>(first - a.lines, 0), last - a.lines);
    }
    // What the thread that packs column block `block` of `now` will likely pack after it.
    Ahead after_block(const Run& now, int64_t block) const {
        const int64_t following = block + now.workspace.threads();
        if (following < now.own_blocks) return Ahead(now, own_b(now, following));
        if (any && following - now.own_blocks < run.own_blocks)
            return Ahead(run, own_b(run, following - now.own_blocks));
        return Ahead();
    }

    Run run;
    bool any;
    Ahead a, b;
};

// A task's share of what comes next, asked for in equal parts before each of its tiles.
struct Asking {
    Asking(const Next& all, int64_t task, int64_t tasks, int64_t tiles)
        : next(all),
          at(next.lines() * task / tasks),
          last(next.lines() * (task + 1) / tasks),
          step(ceil_divide(last - at, tiles)) {}
    Asking(const Next& all, int64_t task, int64_t tasks, int64_t tiles, const Ahead& after)
        : Asking(all, task, tasks, tiles) {
        own = after;
        own_step = ceil_divide(own.lines, tiles);
    }

    void ask() {
        next.ask(at, std::min(at + step, last));
        own.ask(own_at, std::min(own_at + own_step, own.lines));
        at += step;
        own_at += own_step;
    }

    const Next& next;
    int64_t at, last, step;
    Ahead own;  // the column block that the thread packs next
    int64_t own_at = 0, own_step = 0;
};

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

Task make_task(const Run& run, int64_t panel_begin, int64_t panel_end, int64_t column_begin, int64_t column_end,
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
void ask_for_c(const Run& run, int64_t row, int64_t rows, int64_t column) {
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
void compute_tile(const Run& run, const Task& task, int64_t panel, const float* b, int64_t column) {
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
void finish_rows(const Run& run, const Task& task, int64_t begin, int64_t end) {
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
void compute_skinny_task(const Run& run, const Task& task) {
    const int64_t tile_columns = run.products.tile_columns;
    for (int64_t column = task.column_begin; column < task.column_end; column += tile_columns) {
        pack_panels(run, shared_b(run), task.panel, column / tile_columns, column / tile_columns + 1);
        for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel)
            compute_tile(run, task, panel, task.panel, column);
    }
    if (run.last_block()) finish_rows(run, task, task.row_begin, task.row_end);
}

int64_t count_tiles(const Run& run, int64_t panels, int64_t columns) {
    return panels * ceil_divide(columns, run.products.tile_columns);
}

// One block of k, whose panels of b for the task's columns begin at `b`. A panel of a is read from the first-level
// cache by every tile of its row, those of b stream from the second.
void compute_task(const Run& run, const Task& task, const float* b, Asking& asking) {
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
void compute_own_block(const Run& run, const Next& next, int64_t block, int64_t tasks, int thread) {
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
    explicit Cut(const Run& run)
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

void compute_region(const Run& run) {
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
    Run run(kernels, workspace, product);
    do {  // once even for k = 0: the sum is then zero, and the rest still to be done
        pack_region(run);
        compute_region(run);
    } while (run.advance());
}

}  // namespace pytrain::cpu
