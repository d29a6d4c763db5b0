#include "cpu/packing.h"

#include "cpu/threads.h"

namespace pytrain::cpu {

namespace {

using std::int64_t;

// Vectors (rows of op(a), columns of op(b)) that one packing task takes: some microseconds of work. Across, each row of
// the source gives a piece as long as this: short ones would leave memory waiting, so tasks are larger unless there
// are too few of them for the threads.
constexpr int64_t kPackVectors = 64;
constexpr int64_t kMostPackVectors = 512;
constexpr int64_t kPackTasksPerThread = 4;
// Rows of a source that are packed across at a time; as many rows of a panel of any width are whole cache lines.
constexpr int64_t kPackRows = 32;

// Panels of one packing task. What is packed does not depend on it.
int64_t panels_per_task(const ProductRun& run, const Operand& operand) {
    int64_t vectors = kPackVectors;
    while (!operand.along && vectors < kMostPackVectors &&
           operand.panels.vectors >= 2 * vectors * kPackTasksPerThread * run.workspace.threads())
        vectors *= 2;
    return std::max<int64_t>(1, vectors / operand.panels.tile);
}

}  // namespace

void pack_panels(const ProductRun& run, const Operand& operand, float* panels, int64_t begin, int64_t end) {
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

void pack_region(const ProductRun& run) {
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

}  // namespace pytrain::cpu
