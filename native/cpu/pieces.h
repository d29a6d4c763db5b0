// Elementwise work in parallel, in pieces that fit L1.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/rows.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

namespace pytrain::cpu {

// Scratch rows of kPiece elements that every thread has.
constexpr std::int64_t kScratchRows = 6;

struct Piece {
    std::int64_t first, n;
    float* block;                                                                // the thread's scratch
    float* scratch(std::int64_t index) const { return block + index * kPiece; }  // (kPiece), index < kScratchRows
};

// body(piece) for pieces of at most `size` elements (<= kPiece where it uses scratch) that cover [0, n).
template <class Body>
void for_pieces(const Workspace& workspace, std::int64_t n, std::int64_t size, const Body& body) {
    const std::int64_t task_elements = std::max(kTaskElements, size);
    parallel_for(workspace.threads(), ceil_div(n, task_elements), [&](std::int64_t task, int thread) {
        const std::int64_t end = std::min(n, (task + 1) * task_elements);
        for (std::int64_t first = task * task_elements; first < end; first += size)
            body(Piece{first, std::min(size, end - first), workspace.thread(thread)});
    });
}

}  // namespace pytrain::cpu
