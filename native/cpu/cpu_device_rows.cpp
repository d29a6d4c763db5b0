// Embedding, norms, activations and rotations of the CPU device. All are bound by memory.
#include <algorithm>

#include "core/check.h"
#include "cpu/cpu_device.h"
#include "cpu/pieces.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

// Sums over rows are cut into chunks of rows, summed apart and then added in order: at most this many chunks.
constexpr std::int64_t kRowChunks = 64;
constexpr std::int64_t kLeastChunkRows = 32;
constexpr std::int64_t kCacheLine = 64;  // bytes
// Columns of one task where a task owns columns: four cache lines, so that two tasks never write the same one.
constexpr std::int64_t kTaskColumns = 64;
// Rows that are summed in fp32 before they join the total: the error grows with this and the number of such sums, not
// with their product.
constexpr std::int64_t kSumRows = 64;

// Columns of each of two tasks per thread, a multiple of kTaskColumns: long pieces of rows cost fewer calls and let
// prefetchers run. A column's sum does not depend on who its neighbours are, so this may know the threads.
std::int64_t task_columns(std::int64_t columns, int threads) {
    return std::clamp(ceil_div(columns, 2 * threads * kTaskColumns) * kTaskColumns, kTaskColumns, kPiece);
}

// Whether this rank's part of the table has the token.
bool has(const Embed& embed, std::int64_t token) {
    return token >= embed.vocabulary_begin && token < embed.vocabulary_end;
}

// Asks memory for n elements of a token's row, from `column` on: the next token is known, but where its row lies jumps.
void prefetch_token(const Embed& embed, Tensor table, std::int64_t token, std::int64_t column, std::int64_t n) {
    if (!has(embed, token)) return;
    const std::int64_t first = (token - embed.vocabulary_begin) * embed.hidden + column;
    const char* const end = static_cast<const char*>(table.at(first + n).data);
    for (const char* line = static_cast<const char*>(table.at(first).data); line < end; line += kCacheLine)
        __builtin_prefetch(line);
}

std::int64_t chunk_rows(std::int64_t rows) { return std::max(kLeastChunkRows, ceil_div(rows, kRowChunks)); }

// Rows that a forward norm's kernel is given at a time: as many as scratch holds beside weight and bias.
constexpr std::int64_t kNormRows = (kScratchRows - 2) / 2;

}  // namespace

WorkspaceNeed rows_workspace(std::int64_t width) {
    const auto row = static_cast<std::size_t>(std::max(width, kPiece));
    return {static_cast<std::size_t>(kScratchRows) * row, static_cast<std::size_t>(kRowChunks) * 2 * row};
}

void CpuDevice::bias_backward(Tensor dbias, Tensor dy, std::int64_t m, std::int64_t n, std::int64_t ldy, Queue*) {
    const std::int64_t width = task_columns(n, workspace_.threads());
    const auto add_rows = kernels_.add_rows[static_cast<int>(dy.dtype)];
    parallel_for(workspace_.threads(), ceil_div(n, width), [=](std::int64_t task, int thread) {
        const std::int64_t column = task * width;
        const std::int64_t columns = std::min(width, n - column);
        float* const total = workspace_.thread(thread);
        float* const sum = total + width;
        float* const scratch = sum + width;
        std::fill(total, total + columns, 0.0f);
        for (std::int64_t begin = 0; begin < m; begin += kSumRows) {
            std::fill(sum, sum + columns, 0.0f);
            add_rows(sum, dy.at(begin * ldy + column).data, ldy, std::min(kSumRows, m - begin), columns);
            kernels_.add(total, sum, columns);
        }
        float* const out = update_row(kernels_, dbias, column, columns, scratch);
        kernels_.add(out, total, columns);
        write_row(kernels_, dbias, column, columns, out);
    });
}

void CpuDevice::embed_forward(const Embed& embed, Tensor out, Tensor table, Tensor position_table, Queue*) {
    const std::int64_t hidden = embed.hidden;
    workspace_.require(rows_workspace(hidden), "embed_forward");
    const std::int64_t rows = rows_per_task(hidden);
    parallel_for(workspace_.threads(), ceil_div(embed.rows, rows), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        for (std::int64_t row = task * rows; row < std::min(embed.rows, (task + 1) * rows); ++row) {
            float* const y = output_row(out, row * hidden, scratch);
            if (row + 1 < embed.rows) prefetch_token(embed, table, embed.tokens[row + 1], 0, hidden);
            const std::int64_t token = embed.tokens[row];
            if (has(embed, token)) {
                const Tensor source = table.at((token - embed.vocabulary_begin) * hidden);
                kernels_.widen[static_cast<int>(table.dtype)](y, source.data, hidden);
            } else {
                std::fill(y, y + hidden, 0.0f);
            }
            if (position_table) {
                const std::int64_t position = embed.positions[row];
                kernels_.add(y, read_row(kernels_, position_table, position * hidden, hidden, scratch + hidden),
                             hidden);
            }
            write_row(kernels_, out, row * hidden, hidden, y);
        }
    });
}

// Tokens repeat, so rows cannot be shared out among threads: each task owns columns and adds the rows in their order.
void CpuDevice::embed_backward(const Embed& embed, Tensor dtable, Tensor dposition_table, Tensor dout, Queue*) {
    const std::int64_t hidden = embed.hidden;
    const std::int64_t width = task_columns(hidden, workspace_.threads());
    parallel_for(workspace_.threads(), ceil_div(hidden, width), [=](std::int64_t task, int thread) {
        const std::int64_t column = task * width;
        const std::int64_t columns = std::min(width, hidden - column);
        float* const scratch = workspace_.thread(thread);
        const auto add_to = [=](Tensor gradient, std::int64_t index, const float* dy) {
            const std::int64_t first = index * hidden + column;
            float* const sum = update_row(kernels_, gradient, first, columns, scratch + width);
            kernels_.add(sum, dy, columns);
            write_row(kernels_, gradient, first, columns, sum);
        };
        for (std::int64_t row = 0; row < embed.rows; ++row) {
            const float* const dy = read_row(kernels_, dout, row * hidden + column, columns, scratch);
            if (dtable && row + 1 < embed.rows) prefetch_token(embed, dtable, embed.tokens[row + 1], column, columns);
            const std::int64_t token = embed.tokens[row];
            if (dtable && has(embed, token)) add_to(dtable, token - embed.vocabulary_begin, dy);
            if (dposition_table) add_to(dposition_table, embed.positions[row], dy);
        }
    });
}

void CpuDevice::residual_add(Tensor x, Tensor partial, Tensor bias, std::int64_t rows, std::int64_t width, Queue*) {
    workspace_.require(rows_workspace(width), "residual_add");
    const std::int64_t step = rows_per_task(width);
    parallel_for(workspace_.threads(), ceil_div(rows, step), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        const StoredRows stored(kernels_, x, partial);
        const float* const offset = bias ? read_row(kernels_, bias, 0, width, scratch) : nullptr;
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
            void* const sum = stored.update(x, row * width, width, scratch + width);
            const void* const part = stored.read(partial, row * width, width, scratch + 2 * width);
            kernels_.residual[stored.type()](sum, part, offset, width);
            stored.write(x, row * width, width, sum);
        }
    });
}

void CpuDevice::norm_forward(const Norm& norm, Tensor y, Queue*) {
    const std::int64_t width = norm.width;
    const bool centered = norm.kind == NormKind::layernorm;
    check(!centered || norm.bias, "norm_forward: a layernorm needs a bias");
    workspace_.require(rows_workspace(width), "norm_forward");
    const std::int64_t step = std::max(kNormRows, rows_per_task(width));
    parallel_for(workspace_.threads(), ceil_div(norm.rows, step), [=](std::int64_t task, int thread) {
        float* const scratch = workspace_.thread(thread);
        const float* const weight = read_row(kernels_, norm.weight, 0, width, scratch);
        const float* const bias = centered ? read_row(kernels_, norm.bias, 0, width, scratch + width) : nullptr;
        const StoredRows stored(kernels_, norm.x, y);
        const std::int64_t end = std::min(norm.rows, (task + 1) * step);
        for (std::int64_t row = task * step; row < end; row += kNormRows) {
            const std::int64_t rows = std::min(kNormRows, end - row);
            const void* const x = stored.read(norm.x, row * width, rows * width, scratch + 2 * width);
            void* const out = stored.output(y, row * width, scratch + (2 + kNormRows) * width);
            if (centered)
                kernels_.layernorm_forward[stored.type()](out, norm.mean + row, norm.rstd + row, x, weight, bias, rows,
                                                          width, norm.eps);
            else
                kernels_.rmsnorm_forward[stored.type()](out, norm.rstd + row, x, weight, rows, width, norm.eps);
            stored.write(y, row * width, rows * width, out);
        }
    });
}

void CpuDevice::norm_backward(const Norm& norm, Tensor dx, Tensor dweight, Tensor dbias, Tensor dy, Queue*) {
    const std::int64_t width = norm.width;
    const bool centered = norm.kind == NormKind::layernorm;
    check(!centered || dbias, "norm_backward: a layernorm needs a dbias");
    workspace_.require(rows_workspace(width), "norm_backward");
    // Every chunk of rows sums its dweight and dbias apart, in shared scratch (chunks, 2, width).
    const std::int64_t step = chunk_rows(norm.rows);
    const std::int64_t chunks = ceil_div(norm.rows, step);
    float* const partials = workspace_.shared();
    parallel_for(workspace_.threads(), chunks, [=](std::int64_t chunk, int thread) {
        float* const scratch = workspace_.thread(thread);
        const float* const weight = read_row(kernels_, norm.weight, 0, width, scratch);
        float* const weight_sum = partials + chunk * 2 * width;
        float* const bias_sum = weight_sum + width;
        std::fill(weight_sum, weight_sum + 2 * width, 0.0f);
        const StoredRows stored(kernels_, norm.x, dy, dx);
        const std::int64_t end = std::min(norm.rows, (chunk + 1) * step);
        const std::int64_t rows_at_a_time = stored.in_place() ? step : 1;  // scratch holds one of each
        for (std::int64_t row = chunk * step; row < end; row += rows_at_a_time) {
            const std::int64_t rows = std::min(rows_at_a_time, end - row);
            const void* const x = stored.read(norm.x, row * width, rows * width, scratch + width);
            const void* const d = stored.read(dy, row * width, rows * width, scratch + 2 * width);
            void* const sum = stored.update(dx, row * width, rows * width, scratch + 3 * width);
            if (centered)
                kernels_.layernorm_backward[stored.type()](sum, weight_sum, bias_sum, d, x, weight, norm.mean + row,
                                                           norm.rstd + row, rows, width);
            else
                kernels_.rmsnorm_backward[stored.type()](sum, weight_sum, d, x, weight, norm.rstd + row, rows, width);
            stored.write(dx, row * width, rows * width, sum);
        }
    });
    const auto add_chunks = [=](Tensor gradient, const float* sums, std::int64_t column, std::int64_t columns,
                                float* scratch) {
        float* const total = update_row(kernels_, gradient, column, columns, scratch);
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
            kernels_.add(total, sums + chunk * 2 * width + column, columns);
        write_row(kernels_, gradient, column, columns, total);
    };
    parallel_for(workspace_.threads(), ceil_div(width, kTaskColumns), [=](std::int64_t task, int thread) {
        const std::int64_t column = task * kTaskColumns;
        const std::int64_t columns = std::min(kTaskColumns, width - column);
        add_chunks(dweight, partials, column, columns, workspace_.thread(thread));
        if (centered) add_chunks(dbias, partials + width, column, columns, workspace_.thread(thread));
    });
}

void CpuDevice::gelu_forward(Tensor y, Tensor x, std::int64_t n, Queue*) {
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        const StoredRows stored(kernels_, x, y);
        void* const out = stored.output(y, piece.first, piece.scratch(0));
        const void* const value = stored.read(x, piece.first, piece.n, piece.scratch(1));
        kernels_.gelu_forward[stored.type()](out, value, piece.n);
        stored.write(y, piece.first, piece.n, out);
    });
}

void CpuDevice::gelu_backward(Tensor dx, Tensor dy, Tensor x, Tensor y, std::int64_t n, Queue*) {
    for_pieces(workspace_, n, kPiece, [=](const Piece& piece) {
        const StoredRows stored(kernels_, x, dy, dx, y ? y : x);
        const void* const d = stored.read(dy, piece.first, piece.n, piece.scratch(0));
        const void* const value = stored.read(x, piece.first, piece.n, piece.scratch(1));
        void* const out = stored.output(dx, piece.first, piece.scratch(2));
        void* const again = y ? stored.output(y, piece.first, piece.scratch(3)) : nullptr;
        kernels_.gelu_backward[stored.type()](out, again, d, value, piece.n);
        stored.write(dx, piece.first, piece.n, out);
        if (y) stored.write(y, piece.first, piece.n, again);
    });
}

namespace {

// body(row, column, columns, scratch) over (rows, width), rows shared out by shape and each cut into pieces.
template <class Body>
void for_row_pieces(const Workspace& workspace, std::int64_t rows, std::int64_t width, const Body& body) {
    const std::int64_t step = rows_per_task(width);
    parallel_for(workspace.threads(), ceil_div(rows, step), [&](std::int64_t task, int thread) {
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row)
            for (std::int64_t column = 0; column < width; column += kPiece)
                body(row, Piece{column, std::min(kPiece, width - column), workspace.thread(thread)});
    });
}

}  // namespace

void CpuDevice::swiglu_forward(Tensor y, Tensor gate_up, std::int64_t rows, std::int64_t width, Queue*) {
    for_row_pieces(workspace_, rows, width, [=](std::int64_t row, const Piece& piece) {
        const StoredRows stored(kernels_, gate_up, y);
        const std::int64_t gate_first = row * 2 * width + piece.first;
        const void* const gate = stored.read(gate_up, gate_first, piece.n, piece.scratch(0));
        const void* const up = stored.read(gate_up, gate_first + width, piece.n, piece.scratch(1));
        void* const out = stored.output(y, row * width + piece.first, piece.scratch(2));
        kernels_.swiglu_forward[stored.type()](out, gate, up, piece.n);
        stored.write(y, row * width + piece.first, piece.n, out);
    });
}

void CpuDevice::swiglu_backward(Tensor dgate_up, Tensor dy, Tensor gate_up, Tensor y, std::int64_t rows,
                                std::int64_t width, Queue*) {
    for_row_pieces(workspace_, rows, width, [=](std::int64_t row, const Piece& piece) {
        const StoredRows stored(kernels_, gate_up, dgate_up, dy, y ? y : dy);
        const std::int64_t gate_first = row * 2 * width + piece.first;
        const void* const gate = stored.read(gate_up, gate_first, piece.n, piece.scratch(0));
        const void* const up = stored.read(gate_up, gate_first + width, piece.n, piece.scratch(1));
        const std::int64_t first = row * width + piece.first;
        const void* const d = stored.read(dy, first, piece.n, piece.scratch(2));
        void* const dgate = stored.output(dgate_up, gate_first, piece.scratch(3));
        void* const dup = stored.output(dgate_up, gate_first + width, piece.scratch(4));
        void* const again = y ? stored.output(y, first, piece.scratch(5)) : nullptr;
        kernels_.swiglu_backward[stored.type()](dgate, dup, again, d, gate, up, piece.n);
        if (y) stored.write(y, first, piece.n, again);
        stored.write(dgate_up, gate_first, piece.n, dgate);
        stored.write(dgate_up, gate_first + width, piece.n, dup);
    });
}

void CpuDevice::rope(Tensor x, std::int64_t rows, std::int64_t stride, std::int64_t heads, std::int64_t head_size,
                     const std::int32_t* positions, const float* table, bool inverse, Queue*) {
    check(head_size % 2 == 0, "rope: head_size must be even, not ", head_size);
    const std::int64_t step = rows_per_task(heads * head_size);
    const float sign = inverse ? -1.0f : 1.0f;
    parallel_for(workspace_.threads(), ceil_div(rows, step), [=](std::int64_t task, int) {
        for (std::int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row)
            kernels_.rope[static_cast<int>(x.dtype)](x.at(row * stride).data, table + positions[row] * head_size, heads,
                                                     head_size, sign);
    });
}

}  // namespace pytrain::cpu
