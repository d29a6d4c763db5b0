// Packing of a region's operands, and what memory is asked for before it is packed.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/product_run.h"

namespace pytrain::cpu {

// Packs panels [begin, end) of the region's block of k; panel `begin` goes to `panels`.
void pack_panels(const ProductRun& run, const Operand& operand, float* panels, std::int64_t begin, std::int64_t end);

// Packs what all threads share of a region's block of k: op(a), and the columns of op(b) that no task packs itself.
void pack_region(const ProductRun& run);

// The lines of one operand that the next call of pack_region will read, row by row as they are stored.
struct Ahead {
    Ahead() = default;
    Ahead(const ProductRun& next, const Operand& operand) {
        const std::int64_t size = static_cast<std::int64_t>(size_of(operand.source.dtype)), k = next.first_depth;
        const std::int64_t rows = operand.along ? operand.panels.vectors : next.depth;
        const std::int64_t elements = operand.along ? next.depth : operand.panels.vectors;
        const std::int64_t offset = operand.along ? operand.first * operand.ld + k : k * operand.ld + operand.first;
        begin = static_cast<const char*>(operand.source.at(offset).data);
        row_bytes = operand.ld * size;
        lines_per_row = ceil_divide(elements * size, kLine);
        lines = rows * lines_per_row;
    }

    void ask(std::int64_t first, std::int64_t last) const {
        if (first >= last) return;
        std::int64_t row = first / lines_per_row, line = first % lines_per_row;
        for (std::int64_t i = first; i < last; ++i) {
            __builtin_prefetch(begin + row * row_bytes + line * kLine, 0, 2);
            if (++line == lines_per_row) line = 0, ++row;
        }
    }

    static constexpr std::int64_t kLine = 64;
    const char* begin = nullptr;
    std::int64_t row_bytes = 0, lines_per_row = 1, lines = 0;
};

// What is packed after a region's block of k. Packing alone waits for memory most of its time; a source that was asked
// for between the tiles of the block before, a few lines each, waits in cache instead.
struct Next {
    explicit Next(const ProductRun& now) : run(now), any(run.advance()) {
        if (any && run.packs_a()) a = Ahead(run, operand_a(run));
        if (any && run.packs_b()) b = Ahead(run, shared_b(run));
    }

    std::int64_t lines() const { return a.lines + b.lines; }
    void ask(std::int64_t first, std::int64_t last) const {
        a.ask(first, std::min(last, a.lines));
        b.ask(std::max<std::int64_t>(first - a.lines, 0), last - a.lines);
    }
    // What the thread that packs column block `block` of `now` will likely pack after it.
    Ahead after_block(const ProductRun& now, std::int64_t block) const {
        const std::int64_t following = block + now.workspace.threads();
        if (following < now.own_blocks) return Ahead(now, own_b(now, following));
        if (any && following - now.own_blocks < run.own_blocks)
            return Ahead(run, own_b(run, following - now.own_blocks));
        return Ahead();
    }

    ProductRun run;
    bool any;
    Ahead a, b;
};

// A task's share of what comes next, asked for in equal parts before each of its tiles.
struct Asking {
    Asking(const Next& all, std::int64_t task, std::int64_t tasks, std::int64_t tiles)
        : next(all),
          at(next.lines() * task / tasks),
          last(next.lines() * (task + 1) / tasks),
          step(ceil_divide(last - at, tiles)) {}
    Asking(const Next& all, std::int64_t task, std::int64_t tasks, std::int64_t tiles, const Ahead& after)
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
    std::int64_t at, last, step;
    Ahead own;  // the column block that the thread packs next
    std::int64_t own_at = 0, own_step = 0;
};

}  // namespace pytrain::cpu
